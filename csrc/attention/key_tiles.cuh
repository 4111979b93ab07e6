// The backward pass's view of a pattern: tiles of keys, and the queries that see them.
//
// Keys fall into three classes: those of the sink and of strided blocks are *global*, seen by every
// later query; the rest are *local*, seen within the window only. A tile holds keys of one class,
// as a mixed one would drag its local keys through every later query. Within a class keys are
// counted in *columns*: column c is the class's c-th key position, so that 128 neighbouring columns
// are gathered from several blocks where blocks are small. Every key lies in one column of one
// class.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/pattern.h"

namespace longgen {

// No position reaches this.
constexpr int kBeyond = 1 << 30;

constexpr int kKeyTile = 128;

// The thread that looks for tiles has few registers: what lies in memory it is to read again.
__host__ __device__ __forceinline__ void forget_registers() { asm volatile("" ::: "memory"); }

// Positions lo to hi - 1.
struct Run {
  int lo, hi;
};

enum class Columns : int32_t {
  kPositions,  // column c is position c
  kStrided,    // the c-th position of strided blocks
  kBetween,    // the c-th position of all other blocks
};

struct KeyTile {
  Columns columns;
  int column0;      // of its first row
  int lo, hi;       // columns that are the tile's own; its other rows stay empty
  int first_block;  // the first strided block
  bool global;      // seen to the end

  __host__ __device__ __forceinline__ bool owns(int row) const {
    return column0 + row >= lo && column0 + row < hi;
  }

  __host__ __device__ __forceinline__ bool whole() const { return owns(0) && owns(kKeyTile - 1); }

  // Its rows from `first` on, `count` of them: the others are no longer its own.
  __host__ __device__ __forceinline__ KeyTile part(int first, int count) const {
    KeyTile part = *this;
    if (lo < column0 + first) part.lo = column0 + first;
    if (hi > column0 + first + count) part.hi = column0 + first + count;
    return part;
  }

  __host__ __device__ __forceinline__ bool empty() const { return lo >= hi; }

  // Of a column that some tile owns.
  __host__ __device__ __forceinline__ int position(const PatternParams& pattern, int column) const {
    if (columns == Columns::kPositions) return column;
    int block = column >> pattern.log2_block;
    if (columns == Columns::kStrided) {
      block = first_block + block * pattern.stride;
    } else if (block >= first_block) {
      block += (block - first_block) / (pattern.stride - 1) + 1;
    }
    return (block << pattern.log2_block) + (column & ((1 << pattern.log2_block) - 1));
  }

  __host__ __device__ __forceinline__ int first_position(const PatternParams& pattern) const {
    return position(pattern, lo > column0 ? lo : column0);
  }

  __host__ __device__ __forceinline__ int last_position(const PatternParams& pattern) const {
    return position(pattern, (hi < column0 + kKeyTile ? hi : column0 + kKeyTile) - 1);
  }

  // The first position past all queries that see the key at position j.
  __host__ __device__ __forceinline__ int seen_until(const PatternParams& pattern, int j) const {
    int end = kBeyond;
    if (global) return end;
    if (pattern.window_kind == Window::kTokens) end = j + pattern.window;
    if (pattern.window_kind == Window::kBlocks)
      end = ((j >> pattern.log2_block) + pattern.window) << pattern.log2_block;
    return end < kBeyond ? end : kBeyond;
  }

  // The queries that see the key at position j.
  __host__ __device__ __forceinline__ Run seen(const PatternParams& pattern, int j) const {
    return {pattern.causal ? j : -kBeyond, seen_until(pattern, j)};
  }
};

// The queries, of those at positions q_start to q_end - 1, that see some key of a tile.
__host__ __device__ __forceinline__ Run seen_by_some(const PatternParams& pattern,
                                                     const KeyTile& keys, int q_start, int q_end) {
  const int lo = keys.first_position(pattern);
  const int hi = keys.seen_until(pattern, keys.last_position(pattern));
  return {pattern.causal && lo > q_start ? lo : q_start, hi < q_end ? hi : q_end};
}

// The positions from which every row of a tile is seen: none if a row is not the tile's own.
__host__ __device__ __forceinline__ Run seen_by_all(const PatternParams& pattern,
                                                    const KeyTile& keys) {
  if (!keys.whole()) return {kBeyond, 0};
  return {pattern.causal ? keys.last_position(pattern) : -kBeyond,
          keys.seen_until(pattern, keys.first_position(pattern))};
}

// The key tiles of one sequence and KV head: global ones first.
class KeyTiles {
 public:
  __host__ __device__ KeyTiles(const PatternParams& pattern, int k_start, int k_end, int kv_head)
      : strided_(pattern.stride != 0) {
    sink_lo_ = k_start;
    sink_hi_ = pattern.sink < k_end ? pattern.sink : k_end;
    n_sink_ = tiles(sink_lo_, sink_hi_);
    const int rest = pattern.sink > k_start ? pattern.sink : k_start;
    local_lo_ = rest;
    local_hi_ = k_end;
    if (k_end <= rest) {
      local_lo_ = local_hi_ = 0;
    } else if (strided_) {
      const int phase = (pattern.phase_offset + pattern.phase_step * kv_head) % pattern.stride;
      first_block_ = phase == 0 ? 0 : pattern.stride - phase;
      strided_lo_ = strided_below(pattern, rest);
      strided_hi_ = strided_below(pattern, k_end);
      local_lo_ = rest - strided_lo_;
      local_hi_ = k_end - strided_hi_;
    }
    n_strided_ = tiles(strided_lo_, strided_hi_);
    n_local_ = tiles(local_lo_, local_hi_);
  }

  __host__ __device__ __forceinline__ int globals() const { return n_sink_ + n_strided_; }
  __host__ __device__ __forceinline__ int locals() const { return n_local_; }

  // Tile `index` of the global ones, then of the local ones.
  __host__ __device__ __forceinline__ KeyTile operator[](int index) const {
    KeyTile tile{Columns::kPositions, 0, sink_lo_, sink_hi_, first_block_, true};
    if (index >= n_sink_ + n_strided_) {
      index -= n_sink_ + n_strided_;
      tile.columns = strided_ ? Columns::kBetween : Columns::kPositions;
      tile.lo = local_lo_;
      tile.hi = local_hi_;
      tile.global = false;
    } else if (index >= n_sink_) {
      index -= n_sink_;
      tile.columns = Columns::kStrided;
      tile.lo = strided_lo_;
      tile.hi = strided_hi_;
    }
    tile.column0 = (tile.lo & -kKeyTile) + index * kKeyTile;
    return tile;
  }

 private:
  // Tiles are aligned to columns.
  __host__ __device__ static __forceinline__ int tiles(int lo, int hi) {
    return hi > lo ? (hi - (lo & -kKeyTile) + kKeyTile - 1) / kKeyTile : 0;
  }

  // Number of positions of strided blocks before x.
  __host__ __device__ __forceinline__ int strided_below(const PatternParams& pattern, int x) const {
    const int past =
        (x >> pattern.log2_block) - first_block_;  // blocks since the first strided one
    if (past < 0) return 0;
    const int inside = past % pattern.stride == 0 ? x & ((1 << pattern.log2_block) - 1) : 0;
    return ((past + pattern.stride - 1) / pattern.stride << pattern.log2_block) + inside;
  }

  bool strided_;
  int n_sink_ = 0, n_strided_ = 0, n_local_ = 0;
  int sink_lo_ = 0, sink_hi_ = 0, strided_lo_ = 0, strided_hi_ = 0, local_lo_ = 0, local_hi_ = 0;
  int first_block_ = 0;
};

// The query tiles that see a key tile: a run, or the column of a block mask. Tiles are aligned to
// positions, also below 0, and numbered from the one that holds the sequence's first query.
template <int kQueryTile>
class QueryTiles {
 public:
  // Queries stand at positions q_start and up; `seen` says which of them see a key of the tile,
  // whose first one stands at j_first.
  __host__ __device__ QueryTiles(const PatternParams& pattern, const Run& seen, int j_first,
                                 int q_start, int q_head, int q_heads)
      : tile0_(q_start & -kQueryTile) {
    if (seen.hi <= seen.lo) return;
    if (pattern.mask_cols == nullptr) {
      const int end = (seen.hi - tile0_ + kQueryTile - 1) / kQueryTile;
      first_ = (seen.lo - tile0_) / kQueryTile;
      count_ = end - first_;
      return;
    }
    const int shift = pattern.log2_block;
    const int k_block = j_first >> shift;
    if (k_block >= pattern.mask_k_blocks) return;
    const int column = q_head / (q_heads / pattern.mask_heads) * pattern.mask_k_blocks + k_block;
    const int entries = pattern.mask_heads * pattern.mask_k_blocks + 1;
    int begin = entries + pattern.mask_cols[column];
    int end = entries + pattern.mask_cols[column + 1];
    forget_registers();
    while (end > begin && (pattern.mask_cols[end - 1] << pattern.log2_block) >= seen.hi) {
      --end;
      forget_registers();
    }
    while (end > begin && ((pattern.mask_cols[begin] + 1) << pattern.log2_block) <= seen.lo) {
      ++begin;
      forget_registers();
    }
    if (end <= begin) return;
    const int aligned_lo = seen.lo & -kQueryTile;
    const int aligned_hi = (seen.hi + kQueryTile - 1) & -kQueryTile;
    entry_ = begin;
    // Of the first and last block the tiles before and behind the sequence are left out.
    const int before = aligned_lo - (pattern.mask_cols[begin] << shift);
    const int behind = ((pattern.mask_cols[end - 1] + 1) << shift) - aligned_hi;
    first_ = before > 0 ? before / kQueryTile : 0;
    count_ =
        ((end - begin) << shift) / kQueryTile - first_ - (behind > 0 ? behind / kQueryTile : 0);
  }

  __host__ __device__ __forceinline__ int count() const { return count_; }

  // The number of the tile in place `index`.
  __host__ __device__ __forceinline__ int at(const PatternParams& pattern, int index) const {
    index += first_;
    if (pattern.mask_cols == nullptr) return index;
    constexpr int kLog2Tile = kQueryTile == 64 ? 6 : 7;
    static_assert(1 << kLog2Tile == kQueryTile);
    const int log2_per_block = pattern.log2_block - kLog2Tile;
    const int block = pattern.mask_cols[entry_ + (index >> log2_per_block)];
    const int position =
        (block << pattern.log2_block) + ((index & ((1 << log2_per_block) - 1)) << kLog2Tile);
    return (position - tile0_) / kQueryTile;
  }

 private:
  int tile0_;  // position of tile 0
  int first_ = 0, count_ = 0;
  int entry_ = 0;  // first one of a block mask's column
};

}  // namespace longgen
