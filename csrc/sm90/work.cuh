// Which (query tile, head, sequence) a persistent block works on next.
#pragma once

#include "attention/sequence.cuh"
#include "params.h"

namespace longgen::sm90 {

struct Work : Sequence {
  int head;
  int p_tile;  // position of the tile's first row; may lie before q_start

  __device__ __forceinline__ bool empty() const { return p_tile >= q_start + q_len; }
  __device__ __forceinline__ int p_first() const { return max(p_tile, q_start); }
  __device__ __forceinline__ int p_last(int rows) const {
    return min(p_tile + rows, q_start + q_len) - 1;
  }
};

// The item of a block in round `round` of the grid, or -1. Every other round goes backwards, so
// that a block that got a longer tile than its neighbours gets a shorter one next and all stay near
// one head.
__device__ __forceinline__ int work_index(int round, int items) {
  const int index = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  return index < items ? index : -1;
}

// Item `index` of the grid's list: query tiles fastest and, as the last ones of a causal pattern
// are its longest, in descending order; so that blocks at work share the keys of one head in L2.
template <int kBlockM, typename Params>
__device__ __forceinline__ Work work_item(const Params& params, int q_tiles, int index) {
  int tile = q_tiles - 1 - index % q_tiles;
  index /= q_tiles;
  const int head = index % params.q_heads;
  const Sequence sequence = params.cu_seqlens_q == nullptr
                                ? dense_sequence(params, index / params.q_heads)
                                : packed_sequence<true>(params, kBlockM, 2, tile);
  // Tiles are aligned to positions, also below 0.
  return {sequence, head, (sequence.q_start & -kBlockM) + tile * kBlockM};
}

}  // namespace longgen::sm90
