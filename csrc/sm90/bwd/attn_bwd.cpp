// Picks the instantiation. Each is compiled in a file of its own, so that they compile in parallel,
// and found by the linker.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "params.h"
#include "sm90/bwd/plan.h"

namespace longgen {
namespace sm90 {

template <typename T, int kHeadDim>
void launch_attn_bwd(AttentionBwdParams params);

void check_head_dim(const AttentionBwdParams& params) {
  if (params.head_dim != 64 && params.head_dim != 128)
    throw std::invalid_argument("head_dim is " + std::to_string(params.head_dim) +
                                "; the kernel was built for 64 and 128");
}

template <typename T>
void launch(const AttentionBwdParams& params) {
  return params.head_dim == 64 ? launch_attn_bwd<T, 64>(params) : launch_attn_bwd<T, 128>(params);
}

}  // namespace sm90

BwdWorkspace attn_bwd_sm90_workspace(const AttentionBwdParams& params) {
  sm90::check_head_dim(params);
  return sm90::workspace(params, sm90::make_plan(params));
}

void attn_bwd_sm90(const AttentionBwdParams& params) {
  sm90::check_head_dim(params);
  switch (params.dtype) {
    case DType::kFloat16:
      return sm90::launch<__half>(params);
    case DType::kBFloat16:
      return sm90::launch<__nv_bfloat16>(params);
    default:
      throw std::invalid_argument("the kernel takes float16 and bfloat16");
  }
}

}  // namespace longgen
