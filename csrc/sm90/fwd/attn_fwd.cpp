// Picks the instantiation. Each is compiled in a file of its own, so that they compile in parallel,
// and found by the linker.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace longgen {
namespace sm90 {

template <typename T, int kHeadDim>
void launch_attn_fwd(AttentionFwdParams params);

template <typename T>
void launch(const AttentionFwdParams& params) {
  switch (params.head_dim) {
    case 64:
      return launch_attn_fwd<T, 64>(params);
    case 128:
      return launch_attn_fwd<T, 128>(params);
    default:
      throw std::invalid_argument("head_dim is " + std::to_string(params.head_dim) +
                                  "; the kernel was built for 64 and 128");
  }
}

}  // namespace sm90

void attn_fwd_sm90(const AttentionFwdParams& params) {
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
