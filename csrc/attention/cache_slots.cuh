// Which slots of a KV cache a tile of queries visits, and which token each slot holds.
//
// The same arithmetic as Python's CacheLayout. A sequence's chunks of kChunk slots are enumerated
// in two runs: its permanent tokens, in order of their slots, and the part of its ring that the
// window shows, in order of position. The slots of a chunk are neighbours in memory wherever a
// cache is compact.
#pragma once

#include <climits>

#include "params.h"

namespace longgen {

constexpr int kChunk = 16;  // slots; the ring and the sink are multiples of it

class CacheSlots {
 public:
  // The cache is the same for good, so that a compiler knows that it is a kernel's parameter.
  __device__ explicit CacheSlots(const CacheParams& cache) : cache_(cache) {}

  __device__ CacheSlots(const CacheParams& cache, int kv_head, int p_first, int p_last, int end)
      : cache_(cache) {
    visit(kv_head, p_first, p_last, end);
  }

  // Queries stand at positions p_first to p_last; keys are at positions below `end`. Those from
  // `fresh` on are not yet where a kernel reads: their chunks are not whole.
  __device__ __forceinline__ void visit(int kv_head, int p_first, int p_last, int end,
                                        int fresh = INT_MAX) {
    const PatternParams& pattern = cache_.pattern;
    const int shift = pattern.log2_block;
    p_whole_ = min(p_first, fresh - 1);
    p_last_ = p_last;
    if (!compact()) end = min(end, cache_.slots);
    hi_ = min(end, p_last + 1);
    n_permanent_ = max(min(hi_, cache_.sink_slots), 0);
    if (pattern.stride != 0) {
      const int stride = pattern.stride;
      phase_ = (pattern.phase_offset + pattern.phase_step * kv_head) % stride;
      const int low = cache_.sink_slots >> shift;
      first_block_ = low + (stride - (low + phase_) % stride) % stride;
      const int blocks_below = hi_ > 0 ? ((hi_ - 1) >> shift) + 1 : 0;
      if (hi_ > cache_.sink_slots && blocks_below > first_block_) {
        const int blocks = (blocks_below - first_block_ + stride - 1) / stride;
        const int overhang = max(((first_block_ + (blocks - 1) * stride + 1) << shift) - hi_, 0);
        n_permanent_ += (blocks << shift) - overhang;
      }
    }
    if (compact()) n_permanent_ = min(n_permanent_, cache_.slots - cache_.ring);
    permanent_chunks_ = (n_permanent_ + kChunk - 1) / kChunk;
    chunks_ = permanent_chunks_;
    if (pattern.window_kind == Window::kNone || pattern.window == 0) return;
    lo_ = pattern.window_kind == Window::kTokens
              ? p_first + 1 - pattern.window
              : ((p_first >> shift) + 1 - pattern.window) << shift;
    lo_ = max(lo_, cache_.sink_slots);
    ring_chunk_ = lo_ / kChunk;
    if (cache_.ring > 0) ring_slot_ = ring_chunk_ * kChunk % cache_.ring;
    if (hi_ > lo_) chunks_ += (hi_ + kChunk - 1) / kChunk - ring_chunk_;
  }

  __device__ __forceinline__ int count() const { return chunks_; }

  // A token: its position, the last query position that sees it, and its slot (-1: there is none).
  struct Token {
    int position, until, slot;
  };

  __device__ __forceinline__ Token token(int chunk, int row) const {
    constexpr Token kNone{0, -1, -1};
    if (chunk < permanent_chunks_) {
      const int index = chunk * kChunk + row;
      const int position = permanent_position(index);
      if (index >= cache_.sink_slots && position < cache_.sink_slots) return kNone;  // in the sink
      if (index >= n_permanent_ || position >= hi_) return kNone;
      return {position, last_seen(position), compact() ? cache_.ring + index : position};
    }
    const int ahead = (chunk - permanent_chunks_) * kChunk;
    const int position = ring_chunk_ * kChunk + ahead + row;
    if (position < lo_ || position >= hi_ || is_strided(position)) return kNone;
    if (!compact()) return {position, last_seen(position), position};
    return {position, last_seen(position), ring_slot(ahead) + row};
  }

  // The first of a chunk's slots, where they are neighbours.
  __device__ __forceinline__ int first_slot(int chunk) const {
    const int ahead = (chunk - permanent_chunks_) * kChunk;
    if (compact()) return ahead < 0 ? cache_.ring + chunk * kChunk : ring_slot(ahead);
    return ahead < 0 ? permanent_position(chunk * kChunk) : ring_chunk_ * kChunk + ahead;
  }

  // Whether the chunk's slots are neighbours and all queries see all their tokens; also false where
  // that is not plain to see.
  __device__ __forceinline__ bool is_whole(int chunk) const {
    const PatternParams& pattern = cache_.pattern;
    const bool always = pattern.window_kind == Window::kNone;
    if (chunk < permanent_chunks_) {
      const int index = chunk * kChunk, position = permanent_position(index);
      if (index >= cache_.sink_slots) {
        if (!has_chunks(pattern) || position < cache_.sink_slots) return false;
      } else if (!always && index + kChunk > pattern.sink) {
        return false;
      }
      return index + kChunk <= n_permanent_ && position + kChunk - 1 <= p_whole_;
    }
    const int position = ring_chunk_ * kChunk + (chunk - permanent_chunks_) * kChunk;
    if (pattern.stride != 0 && (!has_chunks(pattern) || is_strided(position))) return false;
    return position >= lo_ && position + kChunk - 1 <= p_whole_ && last_seen(position) >= p_last_;
  }

  // The chunk that holds the token at this position, or -1.
  __device__ __forceinline__ int chunk_of(int position) const {
    if (position >= hi_) return -1;
    const int index = permanent_index(position);
    if (index >= 0) return index < n_permanent_ ? index / kChunk : -1;
    if (chunks_ == permanent_chunks_ || position < lo_) return -1;
    return permanent_chunks_ + position / kChunk - ring_chunk_;
  }

  // The slot of a token in a sequence that will have `end` tokens; -1 where it is not kept, or a
  // later one of them takes its place.
  __device__ __forceinline__ int slot(int position, int end) const {
    if (!compact()) return position;
    const int index = permanent_index(position);
    if (index >= 0) return cache_.ring + index;
    return cache_.ring > 0 && position + cache_.ring >= end ? position % cache_.ring : -1;
  }

 private:
  // Whether the blocks of a strided pattern consist of chunks.
  static __device__ __forceinline__ bool has_chunks(const PatternParams& pattern) {
    return pattern.stride != 0 && (1 << pattern.log2_block) >= kChunk;
  }

  // The position of the permanent token of this rank.
  __device__ __forceinline__ int permanent_position(int index) const {
    if (index < cache_.sink_slots) return index;
    const int inside = index - cache_.sink_slots, shift = cache_.pattern.log2_block;
    return ((first_block_ + (inside >> shift) * cache_.pattern.stride) << shift) +
           (inside & ((1 << shift) - 1));
  }

  // The slot of the token so many slots after the first of the run.
  __device__ __forceinline__ int ring_slot(int ahead) const {
    // Two turns suffice: the run is no longer than the ring and a chunk.
    int slot = ring_slot_ + ahead;
    if (slot >= cache_.ring) slot -= cache_.ring;
    if (slot >= cache_.ring) slot -= cache_.ring;
    return slot;
  }

  // A token's place among the permanent ones, or -1.
  __device__ __forceinline__ int permanent_index(int position) const {
    if (position < cache_.sink_slots) return position;
    if (!is_strided(position)) return -1;
    const int shift = cache_.pattern.log2_block;
    const int rank = ((position >> shift) - first_block_) / cache_.pattern.stride;
    return cache_.sink_slots + (rank << shift) + (position & ((1 << shift) - 1));
  }

  __device__ __forceinline__ bool compact() const { return cache_.ring >= 0; }

  __device__ __forceinline__ bool is_strided(int position) const {
    const PatternParams& pattern = cache_.pattern;
    return pattern.stride != 0 && ((position >> pattern.log2_block) + phase_) % pattern.stride == 0;
  }

  __device__ __forceinline__ int last_seen(int position) const {
    const PatternParams& pattern = cache_.pattern;
    if (pattern.window_kind == Window::kNone || position < pattern.sink || is_strided(position))
      return INT_MAX;
    if (pattern.window_kind == Window::kTokens) return position + pattern.window - 1;
    return (((position >> pattern.log2_block) + pattern.window) << pattern.log2_block) - 1;
  }

  const CacheParams& cache_;
  int p_whole_, p_last_;
  int hi_, lo_ = 0;
  int n_permanent_, permanent_chunks_, chunks_, ring_chunk_ = 0, ring_slot_ = 0;
  int first_block_ = 0, phase_ = 0;
};

// Where a slot's row lies: in which sequence's part of the cache, or page, and which row of it.
// The block is -1 where there is none.
struct Place {
  int block, row;
};
__device__ __forceinline__ Place place_of(const CacheParams& cache, int sequence, int slot) {
  if (slot < 0 || slot >= cache.slots) return {-1, 0};
  if (cache.block_table == nullptr) return {sequence, slot};
  const int page =
      __ldcg(cache.block_table + int64_t(sequence) * cache.pages + (slot >> cache.log2_page));
  // The maximum has the table waited for here, not where a block that may be from it is first used,
  // which would have to wait for every load before it.
  return {max(page, -1), slot & ((1 << cache.log2_page) - 1)};
}

// Offset of a slot's row, in elements; -1 where there is none.
__device__ __forceinline__ int64_t slot_offset(const CacheParams& cache, int sequence, int kv_head,
                                               int slot) {
  const Place place = place_of(cache, sequence, slot);
  if (place.block < 0) return -1;
  return place.block * cache.strides.block + kv_head * cache.strides.head +
         place.row * cache.strides.slot;
}

}  // namespace longgen
