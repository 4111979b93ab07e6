// What a block of the persistent decode kernel works on: as much as any other block, of whichever
// tiles.
//
// All tiles stand in a row, in which a tile takes up a place for each pair of its chunks, and some
// before them. The blocks share out the places: each has a run of them, of the end of one tile,
// whole tiles, and the beginning of another, or of a part of one. But of as many equal tiles as
// there are blocks, or more, each has whole ones at the end, so that none has to wait for another
// there, and they share out the first ones, what is left over.
#pragma once

#include "decode/shares.cuh"

namespace longgen::sm90 {

// A block's part of a tile.
struct Piece {
  decode::Share pairs;
  int first_block;  // of those that have a part of the tile
  int part, parts;  // which of them this is, and how many there are
};

// Where the part of a tile lies that its p-th block has found. A block has at most two parts of
// tiles that it shares: of the first tile of its run, and of the last.
__host__ __device__ __forceinline__ int place_of_part(int first_block, int p) {
  return p == 0 ? 2 * first_block + 1 : 2 * (first_block + p);
}

// The whole tiles that a block has of equal ones.
struct WholeTiles {
  int shared;  // tiles before those, of which blocks have runs

  static __host__ __device__ __forceinline__ WholeTiles of(int tiles, int blocks) {
    return {tiles - int(unsigned(tiles) / unsigned(blocks)) * blocks};
  }
  // A block's; each next one is as many further as there are blocks.
  __host__ __device__ __forceinline__ int first(int block) const { return shared + block; }
};

// There are kBeginning places before a tile's pairs: a block begins one in about the time that it
// reads so many. At least one, so that somebody has a tile without pairs.
template <int kBeginning>
class Run {
  static_assert(kBeginning > 0, "");

 public:
  Run() = default;
  __host__ __device__ Run(int places, int blocks, int block)
      : shares_(decode::Shares::of(places, blocks)),
        left_(shares_.of_block(block)),
        block_(block) {}

  __host__ __device__ __forceinline__ bool empty() const { return left_.first >= left_.last; }
  // The first place that is left.
  __host__ __device__ __forceinline__ int next() const { return left_.first; }

  // Goes on to the tile that takes up the places from `start` to before `end`, the next or the one
  // that has the next place. If the run ends before the tile's first pair, there is nothing left.
  __host__ __device__ __forceinline__ void go_on(int start, int end) {
    left_.first = max(left_.first, start);
    if (left_.last <= first_pair(start, end)) left_.last = left_.first;
  }

  // The block's part of that tile, which has `pairs` pairs: if there are more than places, its last
  // block has them too.
  __host__ __device__ __forceinline__ Piece piece(int start, int end, int pairs) const {
    const int zero = start + kBeginning, first_block = shares_.block_of(first_pair(start, end));
    const int first = max(left_.first - zero, 0), last = max(left_.last - zero, 0);
    return {{min(first, pairs), left_.last >= end ? pairs : min(last, pairs)},
            first_block,
            block_ - first_block,
            shares_.block_of(end - 1) - first_block + 1};
  }

 private:
  // The place of a tile's first pair; of a tile without pairs, its last.
  static __host__ __device__ __forceinline__ int first_pair(int start, int end) {
    return min(start + kBeginning, end - 1);
  }

  decode::Shares shares_;
  decode::Share left_;
  int block_;
};

}  // namespace longgen::sm90
