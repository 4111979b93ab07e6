// What a block of the persistent decode kernel works on: as much as any other block, of whichever
// tiles.
//
// All tiles stand in a row, in which a tile takes up a place for each pair of its chunks, and some
// before them. The blocks share out the places: each has a run of them, of the end of one tile,
// whole tiles, and the beginning of another, or of a part of one.
#pragma once

#include "decode/shares.cuh"

namespace longgen::sm90 {

// A block's part of a tile.
struct Piece {
  decode::Share pairs;
  int first_block;  // of those that have a part of the tile
  int part, parts;  // which of them this is, and how many there are
};

class Run {
 public:
  // Places before a tile's pairs: a block begins one in about the time that it reads so many.
  static constexpr int kBeginning = 8;

  __host__ __device__ Run(int places, int blocks, int block)
      : shares_(decode::Shares::of(places, blocks)), left_(shares_.of_block(block)), block_(block) {
    begin_ = left_.first;
  }

  __host__ __device__ __forceinline__ bool empty() const { return left_.first >= left_.last; }
  // The first place that is left, and how many have been done.
  __host__ __device__ __forceinline__ int next() const { return left_.first; }
  __host__ __device__ __forceinline__ int done() const { return left_.first - begin_; }

  // The part of the tile that has the next place. It takes up those from `start` to before `end`,
  // and has `pairs` pairs: if there are more than places, its last block has them too.
  __host__ __device__ __forceinline__ Piece piece(int start, int end, int pairs) const {
    const int zero = start + kBeginning, first_block = shares_.block_of(start);
    const int first = max(left_.first - zero, 0), last = max(left_.last - zero, 0);
    return {{min(first, pairs), left_.last >= end ? pairs : min(last, pairs)},
            first_block,
            block_ - first_block,
            shares_.block_of(end - 1) - first_block + 1};
  }

  // Goes on to the tile after the one that ends there.
  __host__ __device__ __forceinline__ void finish(int end) { left_.first = end; }

  // Where the part of a tile lies that its p-th block has found. A block has at most two parts of
  // tiles that it shares: of the first tile of its run, and of the last.
  static __host__ __device__ __forceinline__ int place_of_part(int first_block, int p) {
    return p == 0 ? 2 * first_block + 1 : 2 * (first_block + p);
  }

 private:
  decode::Shares shares_;
  decode::Share left_;
  int block_, begin_;
};

}  // namespace longgen::sm90
