// Merging partial results: of the warps of a block, and of the splits of a row tile.
#pragma once

#include "arch/sm90/cluster.cuh"
#include "attention/softmax.cuh"
#include "decode/traits.cuh"
#include "params.h"
#include "vector.cuh"

namespace longgen::decode {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxSplits = 128;
constexpr int kMaxCluster = 8;  // blocks; every GPU with clusters runs as many

// A tile of query rows of a KV head: token-major, (token, head of the group).
struct Tile {
  int sequence, kv_head, first_row, rows;
  int64_t index;  // among all

  // Division by multiplication: exact for the at most 288 rows of a KV head and groups up to 16.
  __device__ __forceinline__ int token(const DecodeParams& params, int row) const {
    return ((first_row + row) * params.group_reciprocal) >> 16;
  }
  __device__ __forceinline__ int head(const DecodeParams& params, int row) const {
    return kv_head * params.group + first_row + row - token(params, row) * params.group;
  }
};

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

template <typename T>
__device__ __forceinline__ void store_out(const DecodeParams& params, const Tile& tile, int row,
                                          int column, float4 x) {
  T* const target = out_row<T>(params, tile, row) + column;
  target[0] = from_float<T>(x.x);
  target[1] = from_float<T>(x.y);
  target[2] = from_float<T>(x.z);
  target[3] = from_float<T>(x.w);
}

// A state of attention to some keys, of four columns of a row: not yet divided by the sum.
struct Partial {
  float4 out{0.f, 0.f, 0.f, 0.f};
  float sum = 0.f;

  __device__ __forceinline__ void add(float weight, float4 x, float x_sum) {
    sum += weight * x_sum;
    out.x += weight * x.x;
    out.y += weight * x.y;
    out.z += weight * x.z;
    out.w += weight * x.w;
  }
  // NaN is not 0: it stays NaN.
  __device__ __forceinline__ bool seen() const { return sum != 0.f; }
  __device__ __forceinline__ float4 quotient() const {
    const float factor = seen() ? 1.f / sum : 0.f;
    return {out.x * factor, out.y * factor, out.z * factor, out.w * factor};
  }
  // Base-2 logarithm, -inf for a row that saw nothing.
  __device__ __forceinline__ float lse(float offset) const {
    return seen() ? offset + log2f(sum) : -INFINITY;
  }
};

// Merges what the warps have in their stages. One split: the result. Several: this one's part of
// it, rows of `stride` elements, and its base-2 LSE.
template <typename Traits>
__device__ __forceinline__ void merge_warps(const DecodeParams& params, const Tile& tile,
                                            const typename Traits::Fixed& fixed,
                                            const typename Traits::Stage* stages, float* part,
                                            int stride, float* part_lse) {
  constexpr int kQuads = Traits::kHeadDim / 4;
  for (int i = threadIdx.x; i < tile.rows * kQuads; i += Traits::kThreads) {
    const int row = i / kQuads, column = i % kQuads * 4;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) largest = fmaxf(largest, fixed.maximum[w][row]);
    const float offset = largest == -INFINITY ? 0.f : largest * params.scale_log2;
    Partial merged;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float weight = fast_exp2(fixed.maximum[w][row] * params.scale_log2 - offset);
      const float* const rows = reinterpret_cast<const float*>(stages + w * params.stages);
      merged.add(weight, *reinterpret_cast<const float4*>(rows + row * Traits::kOutStride + column),
                 fixed.sum[w][row]);
    }
    if (params.splits == 1) {
      store_out<typename Traits::T>(params, tile, row, column, merged.quotient());
      if (column == 0) *lse_of(params, tile, row) = merged.lse(offset) * kLn2;
    } else {
      *reinterpret_cast<float4*>(part + row * stride + column) = merged.quotient();
      if (column == 0) part_lse[row] = merged.lse(offset);
    }
  }
}

// Merges the parts of all splits, which are the blocks of a cluster and have them in shared memory.
// The blocks share the elements.
template <typename Traits>
__device__ __forceinline__ void merge_cluster(const DecodeParams& params, const Tile& tile,
                                              int split, const float* part, const float* part_lse) {
  constexpr int kQuads = Traits::kHeadDim / 4;
  sm90::cluster_sync();
  for (int i = split * Traits::kThreads + threadIdx.x; i < tile.rows * kQuads;
       i += params.splits * Traits::kThreads) {
    const int row = i / kQuads, column = i % kQuads * 4;
    float lse[kMaxCluster];
    float4 x[kMaxCluster];
    float largest = -INFINITY;
#pragma unroll
    for (int s = 0; s < kMaxCluster; ++s) {
      const int rank = min(s, params.splits - 1);
      lse[s] = sm90::load_twin(part_lse + row, rank);
      x[s] = sm90::load_twin(
          reinterpret_cast<const float4*>(part + row * Traits::kOutStride + column), rank);
      largest = fmaxf(largest, lse[s]);
    }
    const float offset = largest == -INFINITY ? 0.f : largest;
    Partial merged;
#pragma unroll
    for (int s = 0; s < kMaxCluster; ++s)
      if (s < params.splits) merged.add(fast_exp2(lse[s] - offset), x[s], 1.f);
    store_out<typename Traits::T>(params, tile, row, column, merged.quotient());
    if (column == 0) *lse_of(params, tile, row) = merged.lse(offset) * kLn2;
  }
  sm90::cluster_sync();  // a block's shared memory ends with the block
}

// Merges the parts of all splits; a warp takes a row. Other blocks wrote them in this launch, so
// they are read past the level-1 cache. `weights` is shared memory for kWarps * kMaxSplits.
template <typename Traits>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, const Tile& tile,
                                             float* weights) {
  constexpr int kColumns = Traits::kHeadDim / 32;  // a lane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  weights += warp * kMaxSplits;
  for (int row = warp; row < tile.rows; row += Traits::kWarps) {
    const int64_t part = tile.index * params.splits * Traits::kRows + row;
    float lse[kMaxSplits / 32];  // of splits lane, lane + 32, ...
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int split = i * 32 + lane;
      lse[i] = split < params.splits
                   ? __ldcg(params.part_lse + part + int64_t(split) * Traits::kRows)
                   : -INFINITY;
      largest = fmaxf(largest, lse[i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
    const float offset = largest == -INFINITY ? 0.f : largest;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const float weight = fast_exp2(lse[i] - offset);
      weights[i * 32 + lane] = weight;
      sum += weight;
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffff, sum, distance);
    __syncwarp();

    float out[kColumns] = {};
    const float* from = params.part_out + part * Traits::kHeadDim + lane;
#pragma unroll 16
    for (int split = 0; split < params.splits; ++split) {
      const float weight = weights[split];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] += weight * __ldcg(from + c * 32);
      from += Traits::kRows * Traits::kHeadDim;
    }
    const bool seen = sum != 0.f;
    const float factor = seen ? 1.f / sum : 0.f;
    typename Traits::T* const target = out_row<typename Traits::T>(params, tile, row) + lane;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      target[c * 32] = from_float<typename Traits::T>(out[c] * factor);
    if (lane == 0) *lse_of(params, tile, row) = seen ? (offset + log2f(sum)) * kLn2 : -INFINITY;
    __syncwarp();  // the next row's weights take the same place
  }
}

}  // namespace longgen::decode
