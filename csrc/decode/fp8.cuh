// Caches in e4m3: their bytes as the 16-bit types of the matrix instructions, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "arch/pack.cuh"

namespace longgen::decode {

// Eight neighbouring e4m3 as T. Exact; NaN stays NaN. One instruction for two from sm_89 on, and
// three more where T is bf16, which there is no conversion to.
template <typename T>
__device__ __forceinline__ void from_fp8(uint32_t (&to)[4], uint32_t low, uint32_t high) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = (i < 2 ? low : high) >> i % 2 * 16 & 0xffff;
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    to[i] = reinterpret_cast<const uint32_t&>(raw);
    if constexpr (!std::is_same_v<T, __half>) {
      const float2 x = unpack<__half>(to[i]);
      to[i] = pack<T>(x.x, x.y);
    }
  }
}

// Eight T times `factor` as e4m3: rounded to the nearest, saturating; NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint2 to_fp8(uint4 x, float factor) {
  const uint32_t from[4] = {x.x, x.y, x.z, x.w};
  uint32_t to[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(from[i]);
    const uint32_t bytes =
        __nv_cvt_float2_to_fp8x2({pair.x * factor, pair.y * factor}, __NV_SATFINITE, __NV_E4M3);
    to[i / 2] |= bytes << i % 2 * 16;
  }
  return {to[0], to[1]};
}

}  // namespace longgen::decode
