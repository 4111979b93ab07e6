// Which (query tile, head, sequence) a persistent block works on next.
#pragma once

#include "attention/sequence.cuh"
#include "params.h"

namespace longgen::sm90 {

struct Work : Sequence {
  int head;
  int p_tile;  // position of the tile's first row; may lie before q_start

  __host__ __device__ __forceinline__ bool empty() const { return p_tile >= q_start + q_len; }
  __device__ __forceinline__ int p_first() const { return max(p_tile, q_start); }
  __device__ __forceinline__ int p_last(int rows) const {
    return min(p_tile + rows, q_start + q_len) - 1;
  }
};

// So many items, but not fewer or more tiles of a head, are left for the end; see work_item.
constexpr int kLastItems = 1024;
constexpr int kFewestLastTiles = 8;
constexpr int kMostLastTiles = 32;

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
template <int kBlockM, typename Params>
__host__ __device__ __forceinline__ Work work_item(const Params& params, int q_tiles, int index) {
  const bool packed = params.cu_seqlens_q != nullptr;
  const int heads = params.q_heads * (packed ? 1 : params.batch);  // of all sequences
  const int share = kLastItems / heads;
  const int most = share < kFewestLastTiles ? kFewestLastTiles
                   : share < kMostLastTiles ? share
                                            : kMostLastTiles;
  const int last_tiles = q_tiles < most ? q_tiles : most;
  const int tiles_first = q_tiles - last_tiles;
  int tile, of_all;
  if (index < heads * tiles_first) {
    tile = q_tiles - 1 - index % tiles_first;
    of_all = index / tiles_first;
  } else {
    index -= heads * tiles_first;
    tile = last_tiles - 1 - index / heads;
    of_all = index % heads;
  }
  const int head = of_all % params.q_heads;
  const Sequence sequence = packed ? packed_sequence<true>(params, kBlockM, 2, tile)
                                   : dense_sequence(params, of_all / params.q_heads);
  // Tiles are aligned to positions, also below 0.
  return {sequence, head, (sequence.q_start & -kBlockM) + tile * kBlockM};
}

}  // namespace longgen::sm90
