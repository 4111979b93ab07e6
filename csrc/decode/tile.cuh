// What a thread block of the decode kernel works on.
#pragma once

#include <cstdint>

#include "params.h"

namespace longgen::decode {

// A tile of query rows of a KV head: token-major, (token, head of the group).
struct Tile {
  int sequence, kv_head, first_row, rows;
  int64_t index;  // among all

  // Division by multiplication: exact for the at most 272 rows of a KV head and groups up to 16.
  __device__ __forceinline__ int token(const DecodeParams& params, int row) const {
    return ((first_row + row) * params.group_reciprocal) >> 16;
  }
  __device__ __forceinline__ int head(const DecodeParams& params, int row) const {
    return kv_head * params.group + first_row + row - token(params, row) * params.group;
  }
};

// A sequence's tile of this number.
template <int kRows>
__device__ __forceinline__ Tile tile_of(const DecodeParams& params, int sequence, int number) {
  // Most often one: to look takes less time than a division.
  const int kv_head = params.row_tiles == 1 ? number : number / params.row_tiles;
  const int row_tile = number - kv_head * params.row_tiles;
  const int first_row = row_tile * kRows;
  return {sequence, kv_head, first_row, min(params.n * params.group - first_row, kRows),
          (int64_t(sequence) * params.cache.kv_heads + kv_head) * params.row_tiles + row_tile};
}

// That of this thread block in the grid.
template <int kRows>
__device__ __forceinline__ Tile tile_of_block(const DecodeParams& params) {
  return tile_of<kRows>(params, blockIdx.z, blockIdx.y);
}

// What scores are multiplied by, for weights to base 2, and what outputs are. An fp8 cache's scales
// are in it; without them it is empty, so that nothing is held in registers.
template <typename T, typename Cached>
struct Factors {
  float scaled, out;

  __device__ Factors(const DecodeParams& params, int kv_head)
      : scaled(params.scale_log2 * params.scales.k[kv_head]), out(params.scales.v[kv_head]) {}
  __device__ __forceinline__ float scores(const DecodeParams&) const { return scaled; }
};
template <typename T>
struct Factors<T, T> {
  static constexpr float out = 1.f;

  __device__ Factors(const DecodeParams&, int) {}
  __device__ __forceinline__ float scores(const DecodeParams& params) const {
    return params.scale_log2;
  }
};

// Known to the compiler as the same in a warp, what follows from it lies in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

}  // namespace longgen::decode
