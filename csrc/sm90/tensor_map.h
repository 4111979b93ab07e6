// Descriptors for the bulk tensor copy engine.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "params.h"

namespace longgen::sm90 {

// A (head_dim, rows, heads, batch) tensor of 16 or 8 bits that is copied in boxes of `box_rows`
// rows of 128 bytes, or 64 where a row has no more, and swizzled over that. `sizes` and `strides`
// (in elements, of the last three) are in that order. The driver makes it and wants the thread to
// have a context: call the runtime first, which sees to that; a thread of autograd may have done
// nothing on the device yet.
CUtensorMap tensor_map(const void* data, DType dtype, std::array<int64_t, 4> sizes,
                       std::array<int64_t, 3> strides, int box_rows,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace longgen::sm90
