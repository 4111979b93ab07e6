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
constexpr int kQueryTile = 64;

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
};

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
class QueryTiles {
 public:
  // Queries stand at positions q_start to q_end - 1.
  __host__ __device__ QueryTiles(const PatternParams& pattern, const KeyTile& keys, int q_start,
                                 int q_end, int q_head, int q_heads)
      : log2_block_(pattern.log2_block), tile0_(q_start & -kQueryTile) {
    const int j_first = keys.first_position(pattern);
    const int seen_until = keys.seen_until(pattern, keys.last_position(pattern));
    const int lo = pattern.causal && j_first > q_start ? j_first : q_start;
    const int hi = seen_until < q_end ? seen_until : q_end;
    if (hi <= lo) return;
    const int aligned_lo = lo & -kQueryTile;
    const int aligned_hi = (hi + kQueryTile - 1) & -kQueryTile;
    if (pattern.mask_cols == nullptr) {
      first_ = (aligned_lo - tile0_) / kQueryTile;
      count_ = (aligned_hi - aligned_lo) / kQueryTile;
      return;
    }
    const int k_block = j_first >> log2_block_;
    if (k_block >= pattern.mask_k_blocks) return;
    const int column = q_head / (q_heads / pattern.mask_heads) * pattern.mask_k_blocks + k_block;
    int begin = pattern.mask_cols[column];
    int end = pattern.mask_cols[column + 1];
    const int32_t* entries = pattern.mask_cols + pattern.mask_heads * pattern.mask_k_blocks + 1;
    while (end > begin && (entries[end - 1] << log2_block_) >= hi) --end;
    while (end > begin && ((entries[begin] + 1) << log2_block_) <= lo) ++begin;
    if (end <= begin) return;
    entries_ = entries + begin;
    // Of the first and last block the tiles before and behind the sequence are left out.
    const int before = aligned_lo - (entries_[0] << log2_block_);
    const int behind = ((entries_[end - begin - 1] + 1) << log2_block_) - aligned_hi;
    first_ = before > 0 ? before / kQueryTile : 0;
    count_ = ((end - begin) << log2_block_) / kQueryTile - first_ -
             (behind > 0 ? behind / kQueryTile : 0);
  }

  __host__ __device__ __forceinline__ int count() const { return count_; }

  __host__ __device__ __forceinline__ int operator[](int index) const {
    index += first_;
    if (entries_ == nullptr) return index;
    constexpr int kLog2Tile = 6;
    static_assert(1 << kLog2Tile == kQueryTile);
    const int log2_per_block = log2_block_ - kLog2Tile;
    const int position = (entries_[index >> log2_per_block] << log2_block_) +
                         ((index & ((1 << log2_per_block) - 1)) << kLog2Tile);
    return (position - tile0_) / kQueryTile;
  }

 private:
  int log2_block_;
  int tile0_;  // position of tile 0
  int first_ = 0, count_ = 0;
  const int32_t* entries_ = nullptr;
};

}  // namespace longgen
