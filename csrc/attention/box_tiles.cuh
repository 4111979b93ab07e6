// A query tile's key tiles in the order in which they are visited, and what a row sees of a box.
#pragma once

#include "attention/key_boxes.cuh"

namespace longgen {

class BoxTiles {
 public:
  __host__ __device__ __forceinline__ BoxTiles(const KeyBoxes& boxes, int boxes_per_tile)
      : boxes_(boxes),
        boxes_per_tile_(boxes_per_tile),
        count_((boxes.count() + boxes_per_tile - 1) / boxes_per_tile) {}

  // Box `mine` of the next tile. The first keys come first, then the others from the diagonal
  // leftwards: where there is an attention sink it has the largest scores, and a row's first tile
  // sets what its weights are relative to.
  __host__ __device__ __forceinline__ Box next(int mine) {
    if (boxes_.two_rows()) {
      Box box;
      const int per_block = boxes_.per_block();
      for (int b = 0; b < boxes_per_tile_ / per_block; ++b) {
        const Box other = boxes_.merged(taken_, mine % per_block);
        if (b == mine / per_block) box = other;
      }
      return box;
    }
    const int tile = visited_ == 0 ? 0 : count_ - visited_;
    ++visited_;
    return boxes_[tile * boxes_per_tile_ + mine];
  }
  __host__ __device__ __forceinline__ bool done() const {
    return boxes_.two_rows() ? boxes_.all_taken(taken_) : visited_ == count_;
  }

 private:
  const KeyBoxes& boxes_;
  int boxes_per_tile_, count_;
  int visited_ = 0, taken_[2] = {0, 0};
};

// A box as those who mask see it.
struct alignas(16) KeyBox {
  int position, lo, hi;  // of the first key; the positions that may be visible
  int bits;              // 0: a strided block holds it; 1 + r: hidden from row r of a block mask
};

__host__ __device__ __forceinline__ KeyBox key_box(const KeyBoxes& boxes, const Box& box) {
  return {box.position, box.lo, box.hi, boxes.is_strided(box.position) | box.hidden << 1};
}

// The lowest `count` bits; none below 0, all from 32.
__host__ __device__ __forceinline__ uint32_t bits_below(int count) {
  count = max(count, 0);
#ifdef __CUDA_ARCH__
  uint32_t above;
  asm("shl.b32 %0, %1, %2;" : "=r"(above) : "r"(~0u), "r"(count));  // clamps at 32
  return ~above;
#else
  return count >= 32 ? ~0u : (1u << count) - 1;
#endif
}

// The last position that the query at p may see.
__host__ __device__ __forceinline__ int last_seen(const PatternParams& pattern, int p) {
  return pattern.causal ? p : kNowhere;
}

// Which of the 32 keys from `offset` in the box the query at p, in row `row` of a block mask, sees,
// as bits: those in the box's interval up to its own position, of the window, which begins with
// `first_seen`, of a strided block or of the sink; none if the box is hidden from that row. Without
// a branch, as threads of a warp ask for different boxes.
__host__ __device__ __forceinline__ uint32_t visible_bits(const PatternParams& pattern,
                                                          const KeyBox& box, int offset, int p,
                                                          int first_seen, int row) {
  const int j = box.position + offset;
  const int hi = box.bits & 2 << row ? box.lo : min(box.hi, last_seen(pattern, p) + 1);
  const uint32_t window = box.bits & 1 ? ~0u : ~bits_below(first_seen - j);
  return bits_below(hi - j) & ~bits_below(box.lo - j) & (window | bits_below(pattern.sink - j));
}

// The same for keys 32 * word to 32 * word + 31 of a tile, whose box b is box_of(b); it may
// have 16.
template <typename BoxOf>
__host__ __device__ __forceinline__ uint32_t visible_bits_of_tile(const PatternParams& pattern,
                                                                  const BoxOf& box_of, int log2_box,
                                                                  int word, int p, int first_seen,
                                                                  int row) {
  const int key = word * 32;
  if (log2_box >= 5)
    return visible_bits(pattern, box_of(key >> log2_box), key & ((1 << log2_box) - 1), p,
                        first_seen, row);
  return (visible_bits(pattern, box_of(2 * word), 0, p, first_seen, row) & 0xffff) |
         visible_bits(pattern, box_of(2 * word + 1), 0, p, first_seen, row) << 16;
}

}  // namespace longgen
