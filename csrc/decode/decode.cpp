// Picks the instantiation. Each is compiled in a file of its own, so that they compile in parallel.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace longgen {
namespace decode {

template <typename T, int kHeadDim>
void launch_decode(DecodeParams params);

extern template void launch_decode<__half, 64>(DecodeParams);
extern template void launch_decode<__half, 96>(DecodeParams);
extern template void launch_decode<__half, 128>(DecodeParams);
extern template void launch_decode<__half, 256>(DecodeParams);
extern template void launch_decode<__nv_bfloat16, 64>(DecodeParams);
extern template void launch_decode<__nv_bfloat16, 96>(DecodeParams);
extern template void launch_decode<__nv_bfloat16, 128>(DecodeParams);
extern template void launch_decode<__nv_bfloat16, 256>(DecodeParams);

template <typename T>
void of_head_dim(const DecodeParams& params) {
  switch (params.cache.head_dim) {
    case 64:
      return launch_decode<T, 64>(params);
    case 96:
      return launch_decode<T, 96>(params);
    case 128:
      return launch_decode<T, 128>(params);
    case 256:
      return launch_decode<T, 256>(params);
    default:
      throw std::invalid_argument("head_dim is " + std::to_string(params.cache.head_dim) +
                                  "; the kernel was built for 64, 96, 128 and 256");
  }
}

}  // namespace decode

int decode_rows_per_tile(int rows, int head_dim) { return rows > 8 && head_dim <= 128 ? 16 : 8; }

void attn_decode(const DecodeParams& params) {
  if (params.cache.batch == 0 || params.n == 0) return;
  switch (params.cache.dtype) {
    case DType::kFloat16:
      return decode::of_head_dim<__half>(params);
    case DType::kBFloat16:
      return decode::of_head_dim<__nv_bfloat16>(params);
    default:
      throw std::invalid_argument("the kernel takes float16 and bfloat16");
  }
}

}  // namespace longgen
