// Which (query tile, head, sequence) a persistent block works on next.
#pragma once

#include "params.h"

namespace longgen::sm90 {

struct Work {
  int head, batch;    // batch is the tensor's; 0 when packed
  int sequence;       // of a packed batch
  int q_row0, q_len;  // first row in the tensor and number of rows of the sequence
  int k_row0, k_len;
  int q_start, k_start;  // positions of those rows
  int p_tile;            // position of the tile's first row; may lie before q_start

  __device__ __forceinline__ bool empty() const { return p_tile >= q_start + q_len; }
  __device__ __forceinline__ int p_first() const { return max(p_tile, q_start); }
  __device__ __forceinline__ int p_last(int rows) const {
    return min(p_tile + rows, q_start + q_len) - 1;
  }
};

// At most so many items, and tiles of a head, are left for the end; see work_item.
constexpr int kLastItems = 1024;
constexpr int kLastTiles = 32;

// The item of a block in round `round` of the grid, or -1. Every other round goes backwards, so
// that a block that got a longer tile than its neighbours gets a shorter one next and all stay near
// one head.
__device__ __forceinline__ int work_index(int round, int items) {
  const int index = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  return index < items ? index : -1;
}

// Item `index` of the grid's list. Head by head, query tiles in descending order: blocks at work
// share the keys of one head in L2, and the last tiles of a causal pattern are its longest. The
// first few tiles of all heads come at the end, in descending order together: a causal pattern's
// short ones, which even out what each block has got.
template <int kBlockM>
__device__ __forceinline__ Work work_item(const AttentionFwdParams& params, int index) {
  Work work;
  const int heads = params.work_items / params.q_tiles;  // of all sequences
  const int last_tiles = min(params.q_tiles, min(max(kLastItems / heads, 1), kLastTiles));
  const int tiles_first = params.q_tiles - last_tiles;
  int slot, head;
  if (index < heads * tiles_first) {
    slot = params.q_tiles - 1 - index % tiles_first;
    head = index / tiles_first;
  } else {
    index -= heads * tiles_first;
    slot = last_tiles - 1 - index / heads;
    head = index % heads;
  }
  work.head = head % params.q_heads;
  work.batch = head / params.q_heads;
  int tile = slot;
  if (params.cu_seqlens_q == nullptr) {
    work.q_row0 = work.k_row0 = 0;
    work.q_len = params.seqlen_q;
    work.k_len = params.seqlen_k;
    work.q_start = params.q_start;
    work.k_start = params.k_start;
  } else {
    // Sequence b owns the slots from cu[b] / kBlockM + 2b: enough for all its tiles, without any
    // metadata. Rows past the last sequence form one more, without keys. Offsets are clipped, so
    // that wrong ones cannot reach outside.
    const int32_t* cu_q = params.cu_seqlens_q;
    const int32_t* cu_k = params.cu_seqlens_k;
    const auto clipped = [](int x, int total) { return min(max(x, 0), total); };
    int lo = 0, hi = params.batch;
    while (lo < hi) {
      const int mid = (lo + hi + 1) / 2;
      if (clipped(cu_q[mid], params.seqlen_q) / kBlockM + 2 * mid <= slot) {
        lo = mid;
      } else {
        hi = mid - 1;
      }
    }
    const bool real = lo < params.batch;
    work.sequence = lo;
    work.q_row0 = clipped(cu_q[lo], params.seqlen_q);
    work.k_row0 = clipped(cu_k[lo], params.seqlen_k);
    const int q_end = real ? clipped(cu_q[lo + 1], params.seqlen_q) : params.seqlen_q;
    const int k_end = real ? clipped(cu_k[lo + 1], params.seqlen_k) : work.k_row0;
    work.q_len = max(q_end - work.q_row0, 0);
    work.k_len = max(k_end - work.k_row0, 0);
    if (params.block_table != nullptr)
      work.k_len = min(work.k_len, params.table_pages << params.log2_page);
    work.k_start = real && params.k_starts != nullptr ? params.k_starts[lo] : 0;
    work.q_start = work.k_start + work.k_len - work.q_len;
    if (real && params.q_starts != nullptr) work.q_start = params.q_starts[lo];
    tile = slot - (work.q_row0 / kBlockM + 2 * lo);
  }
  // Tiles are aligned to positions, also below 0.
  work.p_tile = (work.q_start & -kBlockM) + tile * kBlockM;
  return work;
}

}  // namespace longgen::sm90
