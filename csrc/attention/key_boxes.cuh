// Which keys a tile of queries visits, as boxes of consecutive positions.
//
// A box holds 2^log2_rows keys and is aligned to its size; a key tile is made of the next few boxes
// in a list that is never stored: up to three runs (sink, strided blocks, window), or the row of a
// block mask. Where runs overlap the window's has the keys, as it applies the whole definition of
// "visible". A mask of blocks half as long as the tile has two rows in it, which are merged.
#pragma once

#include "attention/pattern.h"

namespace longgen {

// A box that lies behind every key: its rows load as zeros and are masked.
constexpr int kNowhere = 1 << 30;
constexpr int kLog2Tile = 7;

struct Box {
  int position;  // of its first key
  int lo, hi;    // positions that its run may show
  bool masked;   // whether some (query, key) pair of it is not visible
  int hidden;    // bit r: from the queries in row r of a block mask (of two in a tile)
};

__host__ __device__ __forceinline__ int ceil_shift(int x, int shift) {
  return (x + (1 << shift) - 1) >> shift;
}

// From memory that no kernel writes meanwhile.
__host__ __device__ __forceinline__ int32_t load_constant(const int32_t* address) {
#ifdef __CUDA_ARCH__
  return __ldg(address);
#else
  return *address;
#endif
}

// First position that the window shows to the query at p.
__host__ __device__ __forceinline__ int window_lo(const PatternParams& pattern, int p) {
  if (pattern.window_kind == Window::kTokens) return p + 1 - pattern.window;
  if (pattern.window_kind == Window::kBlocks)
    return ((p >> pattern.log2_block) + 1 - pattern.window) << pattern.log2_block;
  return 0;
}

class KeyBoxes {
 public:
  // Queries stand at positions p_first to p_last, keys at k_start to k_end - 1.
  __host__ __device__ KeyBoxes(const PatternParams& pattern, int log2_rows, int p_first, int p_last,
                               int k_start, int k_end, int q_head, int q_heads, int kv_head)
      : pattern_(pattern),
        log2_rows_(log2_rows),
        p_first_(p_first),
        p_last_(p_last),
        k_start_(k_start),
        k_end_(k_end) {
    const int hi = pattern.causal ? min(k_end, p_last + 1) : k_end;
    if (pattern.mask_rows != nullptr) {
      if (two_rows()) {
        // Tiles are aligned: a query's row in the tile is that of its position.
        const bool below[2] = {(p_first >> pattern.log2_block & 1) != 0,
                               (p_last >> pattern.log2_block & 1) != 0};
        if (!below[0]) find_mask_row<0>(p_first, hi, q_head, q_heads);
        if (below[1]) find_mask_row<1>(p_last, hi, q_head, q_heads);
      } else {
        find_mask_row<0>(p_first, hi, q_head, q_heads);
        n_window_ = n_blocks_[0] << (pattern.log2_block - log2_rows);
      }
      return;
    }
    const int shift = pattern.log2_block;
    int lo = k_start;
    if (pattern.window_kind == Window::kTokens) lo = p_first + 1 - pattern.window;
    // No window of blocks reaches past the query itself, also not an empty one.
    if (pattern.window_kind == Window::kBlocks)
      lo = min(((p_first >> shift) + 1 - pattern.window) << shift, p_first + 1);
    lo = max(lo, k_start);
    window_box_ = lo >> log2_rows;
    n_window_ = hi > lo ? ceil_shift(hi, log2_rows) - window_box_ : 0;
    if (pattern.window_kind == Window::kNone) return;

    // The other runs end where the window's first box begins.
    strided_hi_ = hi > lo ? window_box_ << log2_rows : hi;
    const int sink_hi = min(pattern.sink, strided_hi_);
    sink_box_ = k_start >> log2_rows;
    if (sink_hi > k_start) n_sink_ = ceil_shift(sink_hi, log2_rows) - sink_box_;
    if (pattern.stride == 0) return;
    const int stride = pattern.stride;
    phase_ = (pattern.phase_offset + pattern.phase_step * kv_head) % stride;
    first_block_ = phase_ == 0 ? 0 : stride - phase_;
    strided_lo_ = max(sink_hi, k_start);
    if (strided_hi_ <= strided_lo_) return;
    rank_ = blocks_below(strided_lo_ >> shift);
    const int end = blocks_below(ceil_shift(strided_hi_, shift));
    if (end <= rank_) return;
    // The window may begin inside the last block; what it has is cut off.
    const int overhang = max(((first_block_ + (end - 1) * stride + 1) << shift) - strided_hi_, 0);
    n_strided_ = ((end - rank_) << (shift - log2_rows)) - (overhang >> log2_rows);
  }

  __host__ __device__ __forceinline__ int count() const { return n_sink_ + n_strided_ + n_window_; }

  // Two rows of a block mask have no list in common; their boxes come one after the other.
  __host__ __device__ __forceinline__ bool two_rows() const {
    return pattern_.mask_rows != nullptr && pattern_.log2_block < kLog2Tile;
  }
  __host__ __device__ __forceinline__ bool empty() const {
    return count() + n_blocks_[0] + n_blocks_[1] == 0;
  }

  __host__ __device__ __forceinline__ int per_block() const {
    return 1 << (pattern_.log2_block - log2_rows_);
  }

  // Box `part` of the next block, from the last on, that either row has. `taken` counts what was
  // used of each.
  __host__ __device__ __forceinline__ Box merged(int (&taken)[2], int part) const {
    const int above =
        taken[0] < n_blocks_[0] ? load_constant(entries_[0] + n_blocks_[0] - 1 - taken[0]) : -1;
    const int below =
        taken[1] < n_blocks_[1] ? load_constant(entries_[1] + n_blocks_[1] - 1 - taken[1]) : -1;
    const int block = max(above, below);
    if (block < 0) return {kNowhere, k_start_, k_end_, true, 0};
    taken[0] += above == block;
    taken[1] += below == block;
    Box box = window_box((block << pattern_.log2_block) + (part << log2_rows_));
    box.hidden = (above != block) | (below != block) << 1;
    box.masked |= box.hidden != 0;
    return box;
  }
  __host__ __device__ __forceinline__ bool all_taken(const int (&taken)[2]) const {
    return taken[0] == n_blocks_[0] && taken[1] == n_blocks_[1];
  }

  __host__ __device__ __forceinline__ Box operator[](int index) const {
    const int rows = 1 << log2_rows_;
    Box box{kNowhere, k_start_, k_end_, true, 0};
    if (index >= count()) return box;
    if (index < n_sink_) {
      box.position = (sink_box_ + index) << log2_rows_;
      box.hi = min(pattern_.sink, strided_hi_);
      box.masked = box.position < box.lo || box.position + rows > box.hi;
      return box;
    }
    index -= n_sink_;
    if (index < n_strided_) {
      const int log2_per_block = pattern_.log2_block - log2_rows_;
      const int block = first_block_ + (rank_ + (index >> log2_per_block)) * pattern_.stride;
      box.position =
          (block << pattern_.log2_block) + ((index & ((1 << log2_per_block) - 1)) << log2_rows_);
      box.lo = strided_lo_;
      box.hi = strided_hi_;
      box.masked = box.position < box.lo || box.position + rows > box.hi;
      return box;
    }
    index -= n_strided_;
    if (pattern_.mask_rows == nullptr) return window_box((window_box_ + index) << log2_rows_);
    const int log2_per_block = pattern_.log2_block - log2_rows_;
    const int block = load_constant(entries_[0] + (index >> log2_per_block));
    return window_box((block << pattern_.log2_block) +
                      ((index & ((1 << log2_per_block) - 1)) << log2_rows_));
  }

  // Whether a strided block holds the key at this position.
  __host__ __device__ __forceinline__ bool is_strided(int position) const {
    return pattern_.stride != 0 &&
           ((position >> pattern_.log2_block) + phase_) % pattern_.stride == 0;
  }

 private:
  // A box whose keys the window shows, or a block mask; what of them is up to the mask.
  __host__ __device__ __forceinline__ Box window_box(int position) const {
    const int end = position + (1 << log2_rows_), shift = pattern_.log2_block;
    const bool masked =
        position < k_start_ || end > k_end_ || (pattern_.causal && end - 1 > p_first_) ||
        (pattern_.window_kind == Window::kTokens && p_last_ - position >= pattern_.window) ||
        (pattern_.window_kind == Window::kBlocks &&
         (p_last_ >> shift) - (position >> shift) >= pattern_.window);
    return {position, k_start_, k_end_, masked, 0};
  }

  // Number of strided blocks among the first `blocks`.
  __host__ __device__ __forceinline__ int blocks_below(int blocks) const {
    return blocks > first_block_ ? (blocks - first_block_ + pattern_.stride - 1) / pattern_.stride
                                 : 0;
  }

  // Row kRow of the tile is the mask row that the query at p is in.
  template <int kRow>
  __host__ __device__ __forceinline__ void find_mask_row(int p, int hi, int q_head, int q_heads) {
    const int shift = pattern_.log2_block;
    const int q_block = p >> shift;
    if (q_block < 0 || q_block >= pattern_.mask_q_blocks) return;
    const int mask_head = q_head / (q_heads / pattern_.mask_heads);
    const int row = mask_head * pattern_.mask_q_blocks + q_block;
    int begin = load_constant(pattern_.mask_rows + row);
    int end = load_constant(pattern_.mask_rows + row + 1);
    const int32_t* entries = pattern_.mask_rows + pattern_.mask_heads * pattern_.mask_q_blocks + 1;
    // A mask may be larger than the sequence.
    while (end > begin && (load_constant(entries + end - 1) << shift) >= hi) --end;
    while (end > begin && ((load_constant(entries + begin) + 1) << shift) <= k_start_) ++begin;
    entries_[kRow] = entries + begin;
    n_blocks_[kRow] = end - begin;
  }

  const PatternParams& pattern_;
  int log2_rows_;
  int p_first_, p_last_, k_start_, k_end_;
  int n_sink_ = 0, n_strided_ = 0, n_window_ = 0;
  int sink_box_ = 0, window_box_ = 0, rank_ = 0, first_block_ = 0, phase_ = 0;
  int strided_lo_ = 0, strided_hi_ = 0;
  // Of a block mask, for each of its rows in the tile.
  const int32_t* entries_[2] = {nullptr, nullptr};
  int n_blocks_[2] = {0, 0};
};

}  // namespace longgen
