// What a block of the persistent decode kernel works on: as much as any other block, of whichever
// tiles.
//
// All tiles stand in a row, in which a tile takes up a place for each pair of its chunks, and some
// before them. The blocks share out the places: each has a run of them, of the end of one tile,
// whole tiles, and the beginning of another, or of a part of one.
//
// Equal tiles have owners, so that few blocks wait for others at the end of a launch. Of as many
// tiles as there are blocks, or more, each block owns whole ones, and before those attends to its
// run of the first tiles, what is left over. Of fewer, but half as many at least, blocks own one
// each but for its first pairs, and the other blocks share out those, unless these would be so many
// small pieces that they were late.
#pragma once

#include "decode/shares.cuh"

namespace longgen::sm90 {

// A block's part of a tile.
struct Piece {
  decode::Share pairs;
  int part, parts;          // of the blocks that share the tile, which this is, and how many
  int first, second, step;  // where their parts lie

  __host__ __device__ __forceinline__ int place_of(int p) const {
    return p == 0 ? first : second + (p - 1) * step;
  }
};

// There are kBeginning places before a tile's pairs: a block begins one in about the time that it
// reads so many. At least one, so that somebody has a tile without pairs.
template <int kBeginning>
class Run {
  static_assert(kBeginning > 0, "");

 public:
  Run() = default;
  // That of this block, if there are so many.
  __host__ __device__ Run(int places, int blocks, int block)
      : shares_(decode::Shares::of(places, blocks)),
        left_(block < blocks ? shares_.of_block(block) : decode::Share{places, places}) {}

  __host__ __device__ __forceinline__ bool empty() const { return left_.first >= left_.last; }
  // The first place that is left.
  __host__ __device__ __forceinline__ int next() const { return left_.first; }

  // Goes on to the tile that takes up the places from `start` to before `end`, the next or the one
  // that has the next place. If the run ends before the tile's first pair, there is nothing left.
  __host__ __device__ __forceinline__ void go_on(int start, int end) {
    left_.first = max(left_.first, start);
    if (left_.last <= first_pair(start, end)) left_.last = left_.first;
  }

  // This block's part of that tile, which has `pairs` pairs: if there are more than places, its
  // last block has them too. A block has at most two parts of tiles that it shares: of the first
  // tile of its run, and of the last.
  __host__ __device__ __forceinline__ Piece piece(int block, int start, int end, int pairs) const {
    const int zero = start + kBeginning, first_block = this->first_block(start, end);
    const int first = max(left_.first - zero, 0), last = max(left_.last - zero, 0);
    return {{min(first, pairs), left_.last >= end ? pairs : min(last, pairs)},
            block - first_block,
            shares_.block_of(end - 1) - first_block + 1,
            2 * first_block + 1,
            2 * first_block + 2,
            2};
  }

  // The first of the blocks that have parts of that tile.
  __host__ __device__ __forceinline__ int first_block(int start, int end) const {
    return shares_.block_of(first_pair(start, end));
  }

 private:
  // The place of a tile's first pair; of a tile without pairs, its last.
  static __host__ __device__ __forceinline__ int first_pair(int start, int end) {
    return min(start + kBeginning, end - 1);
  }

  decode::Shares shares_;
  decode::Share left_;
};

// How blocks share out equal tiles. Sharers are the first blocks, owners the last.
struct EqualTiles {
  int shared;       // of the first so many tiles,
  int begun;        // the first so many pairs, or 0: all,
  int sharers;      // are shared out among so many blocks
  int first_owned;  // the tile that the first owner has; each next block has the next
  int first_owner;

  // Tiles have so many octets of rows.
  static __host__ __device__ __forceinline__ EqualTiles of(int tiles, int pairs, int blocks,
                                                           int octets) {
    if (tiles >= blocks) {
      const int shared = tiles - int(unsigned(tiles) / unsigned(blocks)) * blocks;
      const int most_sharers = shared * max(kMostParts, pairs * (9 - octets) / 32);
      return {shared, 0, max(1, min(blocks, most_sharers)), shared, 0};
    }
    const int sharers = blocks - tiles;
    const int begun =
        int((float(pairs - kLead) * float(sharers) - float(kPieceCost * tiles)) / float(blocks));
    const bool are_late = kLeastPiece * tiles > sharers * (pairs - begun);
    if (2 * tiles < blocks || begun <= 0 || are_late) return {tiles, 0, blocks, tiles, 0};
    return {tiles, begun, sharers, 0, sharers};
  }

  // How many tiles there are from the first one on that the block owns. Each next one of its own is
  // as many further as there are blocks.
  __host__ __device__ __forceinline__ int from_own(int block, int tiles) const {
    return block < first_owner ? 0 : tiles - (first_owned + block - first_owner);
  }

  // How many of a tile's pairs are shared out.
  __host__ __device__ __forceinline__ int shared_of(int pairs) const {
    return begun > 0 ? min(begun, pairs) : pairs;
  }
  // A block's piece of a tile that may have an owner, where `piece` is that of its run.
  __host__ __device__ __forceinline__ Piece shared_piece(const Piece& piece, int first_block,
                                                         int tile, int tiles) const {
    if (begun == 0) return piece;
    // Tile and block together are a number that no other piece has.
    return {piece.pairs, piece.part + 1, piece.parts + 1, tile, tiles + tile + first_block, 1};
  }
  // Its owner's, where `piece` says how sharers' runs lie.
  __host__ __device__ __forceinline__ Piece own_piece(const Piece& piece, int first_block, int tile,
                                                      int tiles, int pairs) const {
    if (begun == 0) return {{0, pairs}, 0, 1};
    Piece own = shared_piece(piece, first_block, tile, tiles);
    own.pairs = {min(begun, pairs), pairs};
    own.part = 0;
    return own;
  }

 private:
  // Owners end so many pairs later than sharers, so that they find their parts.
  static constexpr int kLead = 2;
  // A piece takes a sharer as long as so many pairs more would, and at least as long as so many do.
  static constexpr int kPieceCost = 3, kLeastPiece = 16;
  // Of tiles that are shared out as a whole, if they are short: merging more would take longer than
  // the whole tiles behind them.
  static constexpr int kMostParts = 16;
};

}  // namespace longgen::sm90
