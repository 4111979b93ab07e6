// Merging what the warps, and then the splits, have found: attention of the same rows to different
// keys. Always in the same order.
#pragma once

#include "attention/softmax.cuh"
#include "decode/append.cuh"
#include "decode/tile.cuh"
#include "vector.cuh"

namespace longgen::decode {

// Two neighbouring elements of a row's output, not divided by the sum of its weights, which are
// relative to 2^offset: -inf where the row saw nothing.
struct Part {
  float offset, sum;
  float2 out;
};

// Reads the parts, kAtOnce of them without waiting for each other, and adds them up.
template <int kAtOnce, typename Read>
__device__ __forceinline__ Part merge(int parts, Read read) {
  constexpr Part kNothing{-INFINITY, 0.f, {0.f, 0.f}};
  Part all = kNothing;
#pragma unroll 1
  for (int first = 0; first < parts; first += kAtOnce) {
    Part next[kAtOnce];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) next[p] = first + p < parts ? read(first + p) : kNothing;
    const float before = all.offset;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) all.offset = fmaxf(all.offset, next[p].offset);
    // What exponents are relative to: never -inf. NaN is in the sums, and stays there.
    const float offset = all.offset == -INFINITY ? 0.f : all.offset;
    const float rescale = fast_exp2(before - offset);
    all.sum *= rescale;
    all.out.x *= rescale;
    all.out.y *= rescale;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      const float weight = fast_exp2(next[p].offset - offset);
      all.sum += weight * next[p].sum;
      all.out.x += weight * next[p].out.x;
      all.out.y += weight * next[p].out.y;
    }
  }
  return all;
}

// Calls f(row, column) for the pairs of elements that are the `index`th of `threads` threads'.
template <int kHeadDim, typename F>
__device__ __forceinline__ void for_pairs(const Tile& tile, int index, int threads, F f) {
  constexpr int kPairs = kHeadDim / 2;
#pragma unroll 1
  for (int i = index; i < tile.rows * kPairs; i += threads) f(i / kPairs, i % kPairs * 2);
}

// A warp's find as a part.
template <typename Found>
__device__ __forceinline__ Part part_of(const Found& found, int row, int column, float scale) {
  return {found.maximum[row] * scale, found.sum[row],
          *reinterpret_cast<const float2*>(found.out + row * Found::kStride + column)};
}

// Stores a row's output, times `factor`, and LSE; 0 and -inf where it saw nothing.
template <typename T>
__device__ __forceinline__ void store_result(const DecodeParams& params, const Tile& tile, int row,
                                             int column, const Part& all, float factor) {
  constexpr float kLn2 = 0.6931471805599453f;
  const int token = tile.token(params, row), head = tile.head(params, row);
  const float share = all.sum != 0.f ? 1.f / all.sum * factor : 0.f;
  T* const out = static_cast<T*>(params.out) +
                 ((int64_t(tile.sequence) * params.n + token) * params.q_heads + head) *
                     params.cache.head_dim +
                 column;
  out[0] = from_float<T>(all.out.x * share);
  out[1] = from_float<T>(all.out.y * share);
  if (column == 0)
    params.lse[(int64_t(tile.sequence) * params.q_heads + head) * params.n + token] =
        all.sum != 0.f ? (all.offset + log2f(all.sum)) * kLn2 : -INFINITY;
}

// The parts of splits on their way through global memory. Other blocks write them in the same
// launch, so they are read past the level-1 cache.
template <typename Traits>
class GlobalParts {
 public:
  __device__ explicit GlobalParts(const DecodeParams& params)
      : out_(params.part_out), weights_(reinterpret_cast<float2*>(params.part_weights)) {}

  __device__ __forceinline__ void store(int64_t place, int row, int column,
                                        const Part& part) const {
    const int64_t i = place * Traits::kRows + row;
    *reinterpret_cast<float2*>(out_ + i * Traits::kHeadDim + column) = part.out;
    if (column == 0) weights_[i] = {part.offset, part.sum};
  }

  __device__ __forceinline__ Part load(int64_t place, int row, int column) const {
    const int64_t i = place * Traits::kRows + row;
    const float2 weights = __ldcg(weights_ + i);
    return {weights.x, weights.y,
            __ldcg(reinterpret_cast<const float2*>(out_ + i * Traits::kHeadDim + column))};
  }

 private:
  float* out_;
  float2* weights_;
};

// Merges what the warps of this block have found, and then, in the last block of the tile, what the
// `count` blocks have that share it. `found(w)` is what a warp has; `place_of(p)` where the part of
// the p-th block lies, of which this is number `mine`.
template <typename Traits, typename OfWarp, typename PlaceOf>
__device__ __forceinline__ void merge_through_memory(const DecodeParams& params, const Tile& tile,
                                                     const typename Traits::Factors& factors,
                                                     int mine, int count, OfWarp found,
                                                     PlaceOf place_of) {
  using T = typename Traits::T;
  constexpr int kAtOnce = 16;
  const float factor = factors.out;
  const GlobalParts<Traits> parts(params);
  for_pairs<Traits::kHeadDim>(tile, threadIdx.x, Traits::kThreads, [&](int row, int column) {
    const Part part = merge<Traits::kWarps>(Traits::kWarps, [&](int w) {
      return part_of(found(w), row, column, factors.scores(params));
    });
    if (count == 1) {
      store_result<T>(params, tile, row, column, part, factor);
    } else {
      parts.store(place_of(mine), row, column, part);
    }
  });
  if (count == 1 || !is_last(params.tickets + params.cache.batch + tile.index, count)) return;
  for_pairs<Traits::kHeadDim>(tile, threadIdx.x, Traits::kThreads, [&](int row, int column) {
    store_result<T>(
        params, tile, row, column,
        merge<kAtOnce>(count, [&](int p) { return parts.load(place_of(p), row, column); }), factor);
  });
}

// The same where each tile has params.splits.
template <typename Traits, typename OfWarp>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, const Tile& tile,
                                             const typename Traits::Factors& factors, int split,
                                             OfWarp found) {
  const int64_t first = tile.index * params.splits;
  merge_through_memory<Traits>(params, tile, factors, split, params.splits, found,
                               [&](int p) { return first + p; });
}

}  // namespace longgen::decode
