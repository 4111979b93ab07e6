// The thread blocks of a launch, where each has one split of a tile, or a whole one.
#pragma once

#include <vector_types.h>

#include "params.h"

namespace longgen::decode {

inline int64_t tiles_of(const DecodeParams& params) {
  return int64_t{params.cache.batch} * params.cache.kv_heads * params.row_tiles;
}
inline int64_t blocks_of(const DecodeParams& params) {
  return params.whole_tiles + (tiles_of(params) - params.whole_tiles) * params.splits;
}
// Splits, KV heads times row tiles, sequences; or all in a row.
inline dim3 grid_of(const DecodeParams& params) {
  if (params.whole_tiles > 0) return dim3(blocks_of(params));
  return dim3(params.splits, params.cache.kv_heads * params.row_tiles, params.cache.batch);
}

}  // namespace longgen::decode
