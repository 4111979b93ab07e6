// What a block of the persistent decode kernel attends to, one after another.
#pragma once

#include "decode/tile.cuh"
#include "sm90/decode/run.cuh"

namespace longgen::sm90 {

// A piece of a tile, its sequence's tokens before and after the new ones, and the warp that
// continues where the others have ended.
struct Task {
  decode::Tile tile;
  Piece piece;
  int old, end;
  int turn;
};

}  // namespace longgen::sm90
