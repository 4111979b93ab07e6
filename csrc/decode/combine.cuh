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

// A state of attention to some keys, of one element of a row, relative to a base-2 offset.
struct Partial {
  float out = 0.f, sum = 0.f;

  __device__ __forceinline__ void add(float weight, float x, float x_sum) {
    sum += weight * x_sum;
    out += weight * x;
  }
  // NaN is not 0: it stays NaN.
  __device__ __forceinline__ float quotient() const { return sum != 0.f ? out / sum : 0.f; }
  // Base-2 logarithm, -inf for a row that saw nothing.
  __device__ __forceinline__ float lse(float offset) const {
    return sum != 0.f ? offset + log2f(sum) : -INFINITY;
  }
};

// An offset to take exponents relative to, from the largest of them.
__device__ __forceinline__ float finite_or_0(float largest) {
  return largest == -INFINITY ? 0.f : largest;
}

template <typename T>
__device__ __forceinline__ void store_result(const DecodeParams& params, const Tile& tile, int row,
                                             int column, const Partial& merged, float offset) {
  out_row<T>(params, tile, row)[column] = from_float<T>(merged.quotient());
  if (column == 0) *lse_of(params, tile, row) = merged.lse(offset) * 0.6931471805599453f;
}

// Merges what the warps have found. One split: the result. Several: this one's part of it, and its
// base-2 LSE.
template <typename Traits>
__device__ __forceinline__ void merge_warps(const DecodeParams& params, const Tile& tile,
                                            const typename Traits::Shared& shared, float* part,
                                            float* part_lse) {
  for (int i = threadIdx.x; i < tile.rows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, column = i % Traits::kHeadDim;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) largest = fmaxf(largest, shared.maximum[w][row]);
    const float offset = finite_or_0(largest * params.scale_log2);
    Partial merged;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w)
      merged.add(fast_exp2(shared.maximum[w][row] * params.scale_log2 - offset),
                 shared.out[w][row * Traits::kOutStride + column], shared.sum[w][row]);
    if (params.splits == 1) {
      store_result<typename Traits::T>(params, tile, row, column, merged, offset);
    } else {
      part[i] = merged.quotient();
      if (column == 0) part_lse[row] = merged.lse(offset);
    }
  }
}

// Merges the parts of all splits. Other blocks wrote them in this launch, so they are read past the
// level-1 cache.
template <typename Traits>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, const Tile& tile) {
  constexpr int kAtOnce = 8;  // splits: reads that are waited for together
  const float* const part_lse = params.part_lse + tile.index * params.splits * Traits::kRows;
  const float* const part_out =
      params.part_out + tile.index * params.splits * Traits::kRows * Traits::kHeadDim;
  for (int i = threadIdx.x; i < tile.rows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, column = i % Traits::kHeadDim;
    float largest = -INFINITY;
    Partial merged;
    for (int first = 0; first < params.splits; first += kAtOnce) {
      float lse[kAtOnce], x[kAtOnce], before = largest;
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        const bool exists = first + s < params.splits;
        const int64_t split_row = int64_t(first + s) * Traits::kRows;
        lse[s] = exists ? __ldcg(part_lse + split_row + row) : -INFINITY;
        x[s] = exists ? __ldcg(part_out + split_row * Traits::kHeadDim + i) : 0.f;
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) largest = fmaxf(largest, lse[s]);
      const float offset = finite_or_0(largest);
      const float rescale = fast_exp2(before - offset);
      merged.out *= rescale;
      merged.sum *= rescale;
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) merged.add(fast_exp2(lse[s] - offset), x[s], 1.f);
    }
    store_result<typename Traits::T>(params, tile, row, column, merged, finite_or_0(largest));
  }
}

}  // namespace longgen::decode
