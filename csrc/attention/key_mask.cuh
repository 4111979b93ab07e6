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

// Hides what is not visible in the tile whose box b is box_of(b); the thread's first row stands at
// p0, its second one 8 further, in row `row` of a block mask.
template <int kScores, typename BoxOf>
__device__ __forceinline__ void hide_keys(float (&s)[kScores], const PatternParams& pattern,
                                          const BoxOf& box_of, int log2_box, int p0, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int p = p0 + 8 * half;
    const int first_seen = window_lo(pattern, p);
#pragma unroll
    for (int word = 0; word < kScores / 16; ++word) {
      const uint32_t seen =
          visible_bits_of_tile(pattern, box_of, log2_box, word, p, first_seen, row) >>
          threadIdx.x % 4 * 2;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& score = s[word * 16 + e / 2 * 4 + half * 2 + e % 2];
        score = seen >> (e / 2 * 8 + e % 2) & 1 ? score : -INFINITY;
      }
    }
  }
}

// The same where boxes hold 32 keys and more, without a branch: the words' bits do not wait for
// each other.
template <int kScores, typename BoxOf>
__device__ __forceinline__ void hide_keys_of_large_boxes(float (&s)[kScores],
                                                         const PatternParams& pattern,
                                                         const BoxOf& box_of, int log2_box, int p0,
                                                         int row) {
  const int first[2] = {window_lo(pattern, p0), window_lo(pattern, p0 + 8)};
  const int last[2] = {last_seen(pattern, p0), last_seen(pattern, p0 + 8)};
#pragma unroll
  for (int word = 0; word < kScores / 16; ++word) {
    const KeyBox box = box_of_row(box_of(word * 32 >> log2_box), row);
    const int offset = word * 32 & ((1 << log2_box) - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t seen =
          shown_bits(pattern, box, offset, first[half], last[half]) >> threadIdx.x % 4 * 2;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& score = s[word * 16 + e / 2 * 4 + half * 2 + e % 2];
        score = seen >> (e / 2 * 8 + e % 2) & 1 ? score : -INFINITY;
      }
    }
  }
}

}  // namespace longgen
