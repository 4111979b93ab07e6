// How the (batch, token, head) rows of an attention output are dealt to thread blocks.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "params.h"

namespace longgen {

// threadIdx.x runs along head_dim and threadIdx.y over the block's rows, tile_tokens x tile_heads
// of them. Eight tokens of a head share each 32-byte sector of its lse, so that the four bytes a
// row needs do not cost a sector each; heads vary fastest, because rows of neighbouring heads are
// neighbours in memory.
struct RowTiles {
  static constexpr int kThreads = 256;
  static constexpr int kTokensPerSector = 8;

  int32_t log2_tile_heads, log2_tile_tokens;
  int32_t head_tiles, token_tiles;
  int32_t lanes;  // threads of one row, a power of two up to 32, so that a row lies within a warp
  int64_t blocks;

  RowTiles(const MergeShape& shape, int elems_per_thread) {
    const int log2_lanes = std::min(log2_ceil(ceil_div(shape.head_dim, elems_per_thread)), 5);
    lanes = 1 << log2_lanes;
    const int log2_rows = log2_ceil(kThreads) - log2_lanes;
    log2_tile_tokens = std::min({log2_ceil(shape.seqlen), log2_ceil(kTokensPerSector), log2_rows});
    log2_tile_heads = std::min(log2_ceil(shape.heads), log2_rows - log2_tile_tokens);
    head_tiles = ceil_div(shape.heads, 1 << log2_tile_heads);
    token_tiles = ceil_div(shape.seqlen, 1 << log2_tile_tokens);
    blocks = int64_t(head_tiles) * token_tiles * shape.batch;
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error("batch x seqlen x heads is too large for one launch");
    }
  }

  dim3 grid() const { return dim3(static_cast<unsigned>(blocks)); }
  dim3 block() const { return dim3(lanes, 1u << (log2_tile_heads + log2_tile_tokens)); }

  static constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }
  static constexpr int log2_ceil(int n) {
    int log2 = 0;
    while ((int64_t(1) << log2) < n) ++log2;
    return log2;
  }
};

#ifdef __CUDACC__
// The row of the calling thread.
struct Row {
  int32_t batch, token, head;
  bool exists;  // the last tiles reach past the end

  __device__ Row(const RowTiles& tiles, const MergeShape& shape) {
    const uint32_t heads_first = blockIdx.x / uint32_t(tiles.head_tiles);
    const int32_t head_tile = blockIdx.x - heads_first * tiles.head_tiles;
    batch = heads_first / uint32_t(tiles.token_tiles);
    const int32_t token_tile = heads_first - batch * tiles.token_tiles;
    const int32_t row = threadIdx.y;
    head = (head_tile << tiles.log2_tile_heads) + (row & ((1 << tiles.log2_tile_heads) - 1));
    token = (token_tile << tiles.log2_tile_tokens) + (row >> tiles.log2_tile_heads);
    exists = head < shape.heads && token < shape.seqlen;
  }

  __device__ int64_t offset(const OutStrides& s) const {
    return batch * s.batch + token * s.seqlen + head * s.head;
  }
  __device__ int64_t offset(const LseStrides& s) const {
    return batch * s.batch + head * s.head + token * s.seqlen;
  }
};
#endif

}  // namespace longgen
