// Merging what the warps, and then the splits, have found: attention to different keys, each with
// the log-sum-exp of its scores. Always in the same order.
#pragma once

#include "attention/softmax.cuh"
#include "decode/tile.cuh"
#include "decode/traits.cuh"
#include "vector.cuh"

namespace longgen::decode {

constexpr int kMaxSplits = 128;

template <typename T>
__device__ __forceinline__ T* out_row(const DecodeParams& params, const Tile& tile, int row) {
  const int64_t token = int64_t(tile.sequence) * params.n + tile.token(params, row);
  return static_cast<T*>(params.out) +
         (token * params.q_heads + tile.head(params, row)) * params.cache.head_dim;
}

__device__ __forceinline__ float* lse_of(const DecodeParams& params, const Tile& tile, int row) {
  const int64_t head = int64_t(tile.sequence) * params.q_heads + tile.head(params, row);
  return params.lse + head * params.n + tile.token(params, row);
}

// An offset to take exponents relative to, from the largest of them.
__device__ __forceinline__ float finite_or_0(float largest) {
  return largest == -INFINITY ? 0.f : largest;
}
// A share of a sum; 0 for a row that saw nothing. NaN is not 0: it stays NaN.
__device__ __forceinline__ float over(float x, float sum) { return sum != 0.f ? x / sum : 0.f; }
// From base 2; -inf for a row that saw nothing.
__device__ __forceinline__ float base2_lse(float offset, float sum) {
  return sum != 0.f ? offset + log2f(sum) : -INFINITY;
}
constexpr float kLn2 = 0.6931471805599453f;

// Merges what the warps have found. One split: the result. Several: this one's part of it, and its
// base-2 LSE.
template <typename Traits>
__device__ __forceinline__ void merge_warps(const DecodeParams& params, const Tile& tile,
                                            typename Traits::Shared& shared, float* part,
                                            float* part_lse) {
  static_assert(Traits::kWarps <= 32, "a lane for each warp");
  const int lane = threadIdx.x % 32;
  // What a warp's output counts in a row takes the place of its maximum: a warp has a row.
  for (int row = threadIdx.x / 32; row < tile.rows; row += Traits::kWarps) {
    const bool exists = lane < Traits::kWarps;
    const float maximum = exists ? shared.maximum[lane][row] * params.scale_log2 : -INFINITY;
    float largest = maximum;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    const float offset = finite_or_0(largest);
    const float weight = fast_exp2(maximum - offset);
    float sum = exists ? weight * shared.sum[lane][row] : 0.f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (exists) shared.maximum[lane][row] = over(weight, sum);
    if (lane > 0) continue;
    if (params.splits == 1) {
      *lse_of(params, tile, row) = base2_lse(offset, sum) * kLn2;
    } else {
      part_lse[row] = base2_lse(offset, sum);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.rows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, column = i % Traits::kHeadDim;
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w)
      x += shared.maximum[w][row] * shared.out[w][row * Traits::kOutStride + column];
    if (params.splits == 1) {
      out_row<typename Traits::T>(params, tile, row)[column] = from_float<typename Traits::T>(x);
    } else {
      part[i] = x;
    }
  }
}

// Merges the parts of all splits. Other blocks wrote them in this launch, so they are read past the
// level-1 cache.
template <typename Traits>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, const Tile& tile) {
  constexpr int kAtOnce = 16;  // splits: reads that are waited for together
  constexpr int kPairs = Traits::kHeadDim / 2;
  const float* const part_lse = params.part_lse + tile.index * params.splits * Traits::kRows;
  const float2* const part_out = reinterpret_cast<const float2*>(params.part_out) +
                                 tile.index * params.splits * Traits::kRows * kPairs;
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.rows * kPairs; i += Traits::kThreads) {
    const int row = i / kPairs, column = i % kPairs * 2;
    const float* next_lse = part_lse + row;
    const float2* next = part_out + i;
    float largest = -INFINITY, sum = 0.f;
    float2 out{0.f, 0.f};
#pragma unroll 1
    for (int left = params.splits; left > 0; left -= kAtOnce) {
      float lse[kAtOnce];
      float2 x[kAtOnce];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        lse[s] = s < left ? __ldcg(next_lse + s * Traits::kRows) : -INFINITY;
        x[s] = s < left ? __ldcg(next + s * Traits::kRows * kPairs) : float2{};
      }
      next_lse += kAtOnce * Traits::kRows;
      next += kAtOnce * Traits::kRows * kPairs;
      const float before = largest;
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) largest = fmaxf(largest, lse[s]);
      const float offset = finite_or_0(largest);
      const float rescale = fast_exp2(before - offset);
      sum *= rescale;
      out.x *= rescale;
      out.y *= rescale;
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        const float weight = fast_exp2(lse[s] - offset);
        sum += weight;
        out.x += weight * x[s].x;
        out.y += weight * x[s].y;
      }
    }
    typename Traits::T* const target = out_row<typename Traits::T>(params, tile, row) + column;
    target[0] = from_float<typename Traits::T>(over(out.x, sum));
    target[1] = from_float<typename Traits::T>(over(out.y, sum));
    if (column == 0) *lse_of(params, tile, row) = base2_lse(finite_or_0(largest), sum) * kLn2;
  }
}

}  // namespace longgen::decode
