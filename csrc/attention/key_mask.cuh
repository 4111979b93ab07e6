// Hides keys from the scores in the accumulators of a warpgroup, queries by keys.
#pragma once

#include "attention/box_tiles.cuh"

namespace longgen {

// Whether a tile of `boxes_per_tile` boxes, from box `first_box`, has a pair that is not visible.
__device__ __forceinline__ bool some_masked(const KeyBoxes& boxes, int first_box,
                                            int boxes_per_tile) {
  bool any = false;
  for (int b = 0; b < boxes_per_tile; ++b) any |= boxes[first_box + b].masked;
  return any;
}

// The keys of a tile, 32 a word, that a thread's two rows of scores see, as bits; bits 8 * e and
// 8 * e + 1 are those of its own columns.
template <int kScores>
struct VisibleKeys {
  static constexpr int kWords = kScores / 16;
  uint32_t bits[2][kWords];
};

// Of the tile whose box b is box_of(b); the thread's first row stands at p0, its second one 8
// further, in row `row` of a block mask. The threads that share the rows work out a word each.
// Called by whole warps.
template <int kScores, typename BoxOf>
__device__ __forceinline__ VisibleKeys<kScores> visible_keys(const PatternParams& pattern,
                                                             const BoxOf& box_of, int log2_box,
                                                             int p0, int row) {
  VisibleKeys<kScores> seen;
  constexpr int kWords = VisibleKeys<kScores>::kWords;
  static_assert(kWords == 2 || kWords == 4, "four threads share a row");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int p = p0 + 8 * half;
    const uint32_t mine = visible_bits_of_tile(pattern, box_of, log2_box, threadIdx.x % kWords, p,
                                               window_lo(pattern, p), row);
#pragma unroll
    for (int word = 0; word < kWords; ++word)
      seen.bits[half][word] = __shfl_sync(0xffffffff, mine, word, kWords) >> threadIdx.x % 4 * 2;
  }
  return seen;
}

template <int kScores>
__device__ __forceinline__ void hide_others(float (&s)[kScores], const VisibleKeys<kScores>& seen) {
#pragma unroll
  for (int word = 0; word < VisibleKeys<kScores>::kWords; ++word) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& score = s[word * 16 + i];
      const bool shown = seen.bits[i / 2 % 2][word] >> (i / 4 * 8 + i % 2) & 1;
      score = shown ? score : -INFINITY;
    }
  }
}

}  // namespace longgen
