// A pattern as the tests of the kernels' enumerations hand it over.
#pragma once

#include <cstdint>

#include "attention/pattern.h"

// `code` is PatternParams in order, without its pointers.
inline longgen::PatternParams decode(const int32_t* code, const int32_t* mask_rows,
                                     const int32_t* mask_cols) {
  longgen::PatternParams pattern{};
  pattern.causal = code[0];
  pattern.window_kind = static_cast<longgen::Window>(code[1]);
  pattern.window = code[2];
  pattern.sink = code[3];
  pattern.stride = code[4];
  pattern.log2_block = code[5];
  pattern.phase_step = code[6];
  pattern.phase_offset = code[7];
  pattern.mask_rows = mask_rows;
  pattern.mask_heads = code[8];
  pattern.mask_q_blocks = code[9];
  pattern.mask_cols = mask_cols;
  pattern.mask_k_blocks = code[10];
  return pattern;
}
