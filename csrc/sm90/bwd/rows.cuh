// Accumulators of gradients: as rows of a tensor, and as they lie, for sums in memory.
#pragma once

#include "arch/sm90/wgmma.cuh"

namespace longgen::sm90 {

// Turns four words of each thread of a quad around: thread t has word t of all four.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1;
  const bool upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffff, odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i];
    words[i + 1] = odd ? words[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i];
    words[i + 2] = upper ? words[i + 2] : got;
  }
}

// Writes the two rows of a thread's accumulators, where they exist, 16 bytes a thread.
template <typename T, int kSize>
__device__ __forceinline__ void store_rows(T* row, T* row_below, const float (&d)[kSize],
                                           float scale) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const target = half == 0 ? row : row_below;
#pragma unroll
    for (int i = 2 * half; i < kSize; i += 16) {  // 4 chunks of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        words[c] = pack<T>(d[i + 4 * c] * scale, d[i + 4 * c + 1] * scale);
      transpose_quad(words);
      if (target != nullptr)
        *reinterpret_cast<uint4*>(target + i / 16 * 32 + quad_lane * 8) =
            uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

// A warp's accumulators as they lie: chunk after chunk of 8 columns, 16 bytes a thread.
template <int kSize>
__device__ __forceinline__ void store_accumulators(float* target, const float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4)
    reinterpret_cast<float4*>(target)[i / 4 * 32 + threadIdx.x % 32] =
        float4{d[i], d[i + 1], d[i + 2], d[i + 3]};
}

template <int kSize>
__device__ __forceinline__ void add_accumulators(const float* source, float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const float4 x = reinterpret_cast<const float4*>(source)[i / 4 * 32 + threadIdx.x % 32];
    d[i] += x.x;
    d[i + 1] += x.y;
    d[i + 2] += x.z;
    d[i + 3] += x.w;
  }
}

// The first of the two rows of 64, 8 apart, that a thread of a warpgroup holds.
__device__ __forceinline__ int accumulator_row() {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

}  // namespace longgen::sm90
