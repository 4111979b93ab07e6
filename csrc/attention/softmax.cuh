// Online softmax over the rows that a thread of a wgmma accumulator holds: two of them, 8 apart.
#pragma once

#include <cstdint>

namespace longgen {

// Over the four threads that share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// 2^x on the special function unit: one instruction, denormal results flushed.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) and 1 / x on the same unit, to about the last bit; denormal arguments count as 0.
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Base 2 throughout: `scale_log2` is the softmax scale times log2(e), so that a weight is one
// multiply-add and one exp2.
//
// Weights are relative to a reference that need not be the maximum: any value is right that keeps
// them inside the number formats. A row's first tile sets it (`refer`); later tiles are weighed on
// the assumption that it still serves, which costs no maximum, no shuffle and no rescaling, and the
// sum of the weights tells whether it did (`fits`). If not, the tile is done again with its
// maximum.
struct OnlineSoftmax {
  static constexpr float kLag = 8.f;                  // `refer` leaves references up to 2^8 too low
  static constexpr float kLargestSum = 8192.f;        // that `fits`; fp16 ends at 65504
  static constexpr float kNoReference = -1e30f;       // anything visible exceeds it
  float reference[2] = {kNoReference, kNoReference};  // of scaled scores
  float sum[2] = {0.f, 0.f};                          // of this thread's columns

  // Sums of a tile's weights so far, of each row: short chains of dependent instructions.
  using PartialSums = float[2][4];

  // Turns scores kBegin to kEnd - 1 of a tile, which has a multiple of 16, into weights, and adds
  // these to `sums`: the last kLead only at the end of the tile, as exponentials answer late.
  template <int kBegin, int kEnd, int kSize>
  __device__ __forceinline__ void weigh(float (&s)[kSize], float scale_log2,
                                        PartialSums& sums) const {
    constexpr int kLead = 8;
#pragma unroll
    for (int i = kBegin; i < (kEnd == kSize ? kEnd + kLead : kEnd); i += 4) {
      if (i < kEnd) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i + e] = fast_exp2(s[i + e] * scale_log2 - reference[e / 2]);
      }
      const int done = i - kLead;
      if (done < 0) continue;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float pair = s[done + 2 * row] + s[done + 2 * row + 1];
        float& sum = sums[row][done / 4 % 4];
        sum = done < 16 ? pair : sum + pair;
      }
    }
  }

  __device__ __forceinline__ static void total(const PartialSums& sums, float (&tile_sum)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
      tile_sum[row] = (sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]);
  }

  // Turns a tile's scores into weights; `tile_sum` is their sum, not yet part of `sum`.
  template <int kSize>
  __device__ __forceinline__ void weigh(float (&s)[kSize], float scale_log2,
                                        float (&tile_sum)[2]) const {
    PartialSums sums;
    weigh<0, kSize>(s, scale_log2, sums);
    total(sums, tile_sum);
  }

  // Whether the weights of this sum were relative to a good reference; NaN was not.
  __device__ __forceinline__ static bool fits(const float (&tile_sum)[2]) {
    return tile_sum[0] <= kLargestSum && tile_sum[1] <= kLargestSum;
  }

  __device__ __forceinline__ void add(const float (&tile_sum)[2]) {
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

  // Makes the scores' maximum the reference, unless that is at most 2^kLag below. Earlier outputs
  // are to be multiplied by `rescale`.
  template <int kSize>
  __device__ __forceinline__ void refer(const float (&s)[kSize], float scale_log2,
                                        float (&rescale)[2]) {
    float part[2][4];
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float larger = fmaxf(s[i + 2 * row], s[i + 2 * row + 1]);
        part[row][i / 4 % 4] = i < 16 ? larger : fmaxf(part[row][i / 4 % 4], larger);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float tile_max = scale_log2 * quad_max(fmaxf(fmaxf(part[row][0], part[row][1]),
                                                         fmaxf(part[row][2], part[row][3])));
      const float next = tile_max - reference[row] > kLag ? tile_max : reference[row];
      rescale[row] = fast_exp2(reference[row] - next);
      reference[row] = next;
      sum[row] *= rescale[row];
    }
  }
};

}  // namespace longgen
