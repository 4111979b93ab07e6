// Hides keys from the scores in the accumulators of a warpgroup, queries by keys.
#pragma once

#include "attention/key_boxes.cuh"

namespace longgen {

// Whether a tile of `boxes_per_tile` boxes, from box `first_box`, has a pair that is not visible.
__device__ __forceinline__ bool some_masked(const KeyBoxes& boxes, int first_box,
                                            int boxes_per_tile) {
  bool any = false;
  for (int b = 0; b < boxes_per_tile; ++b) any |= boxes[first_box + b].masked;
  return any;
}

// Hides what is not visible in the tile that begins at box `first_box`; the thread's first row
// stands at p0, its second one 8 further. In a row the visible keys of a box are an interval, and
// before it those of the sink.
template <int kScores>
__device__ __forceinline__ void hide_keys(float (&s)[kScores], const PatternParams& pattern,
                                          const KeyBoxes& boxes, int first_box, int log2_box,
                                          int p0) {
  const int first_seen[2] = {window_lo(pattern, p0), window_lo(pattern, p0 + 8)};
  const int causal_hi[2] = {pattern.causal ? p0 : kNowhere - 1,
                            pattern.causal ? p0 + 8 : kNowhere - 1};
#pragma unroll
  for (int group = 0; group < kScores / 8; ++group) {  // 16 keys never straddle a box or a block
    const Box box = boxes[first_box + (group * 16 >> log2_box)];
    const int group_position = box.position + (group * 16 & ((1 << log2_box) - 1));
    const int j0 = group_position + threadIdx.x % 4 * 2;
    const bool strided = boxes.is_strided(group_position);
    const int sink = pattern.sink - j0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int near = strided ? -kNowhere : first_seen[half] - j0;
      const int lo = box.lo - j0;
      const int hi = min(box.hi - 1, causal_hi[half]) - j0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = e / 2 * 8 + e % 2;
        const bool seen = (c <= hi) & (c >= lo) & ((c >= near) | (c < sink));
        float& score = s[group * 8 + e / 2 * 4 + half * 2 + e % 2];
        score = seen ? score : -INFINITY;
      }
    }
  }
}

}  // namespace longgen
