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

// Base 2 throughout: `scale_log2` is the softmax scale times log2(e), so that a weight is one
// multiply-add and one exp2.
//
// The maximum that weights are relative to may lag behind the true one by a factor of up to 2^kLag:
// rescaling the output then is rare. Weights stay below 2^kLag, which neither fp16 nor a sum in
// fp32 minds, and the quotient is the same.
struct OnlineSoftmax {
  static constexpr float kLag = 8.f;
  float maximum[2] = {-INFINITY, -INFINITY};  // of the unscaled scores so far, or a little less
  float sum[2] = {0.f, 0.f};                  // of this thread's columns

  // Turns scores into weights. Returns whether some row of the warp has a new maximum; `rescale` is
  // then what earlier outputs are multiplied by.
  template <int kSize>
  __device__ __forceinline__ bool update(float (&s)[kSize], float scale_log2, float (&rescale)[2]) {
    // Four partial results a row and both rows together: a single chain of dependent instructions
    // would leave the warp, alone on its scheduler while the other warpgroup multiplies, waiting
    // for itself.
    float part[2][4];
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float larger = fmaxf(s[i + 2 * row], s[i + 2 * row + 1]);
        part[row][i / 4 % 4] = i < 16 ? larger : fmaxf(part[row][i / 4 % 4], larger);
      }
    }
    bool grown = false;
    float offset[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float tile_max =
          quad_max(fmaxf(fmaxf(part[row][0], part[row][1]), fmaxf(part[row][2], part[row][3])));
      const bool grows =
          (tile_max - maximum[row]) * scale_log2 > kLag;  // -inf minus -inf is NaN: no
      const float new_max = grows ? tile_max : maximum[row];
      rescale[row] = grows ? fast_exp2((maximum[row] - new_max) * scale_log2) : 1.f;
      maximum[row] = new_max;
      // A row that has seen nothing keeps -inf; 0 in its place makes its weights exp2(-inf) = 0.
      offset[row] = new_max == -INFINITY ? 0.f : new_max * scale_log2;
      grown |= grows;
    }
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& x = s[i + 2 * row];
        float& y = s[i + 2 * row + 1];
        x = fast_exp2(x * scale_log2 - offset[row]);
        y = fast_exp2(y * scale_log2 - offset[row]);
        part[row][i / 4 % 4] = i < 16 ? x + y : part[row][i / 4 % 4] + (x + y);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row)
      sum[row] =
          sum[row] * rescale[row] + ((part[row][0] + part[row][1]) + (part[row][2] + part[row][3]));
    grown = __any_sync(0xffffffff, grown);
    return grown;
  }
};

}  // namespace longgen
