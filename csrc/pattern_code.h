// A pattern as Python passes it.
#pragma once

#include <array>
#include <cstdint>

#include "params.h"

namespace longgen {

// The ints of Python's `pattern.encode()`, and a block mask's rows and columns (nullptr: none, or
// not needed).
inline PatternParams parse_pattern(const std::array<int32_t, 9>& code, const int32_t* mask_rows,
                                   const int32_t* mask_cols = nullptr) {
  PatternParams p{};
  p.causal = code[1];
  int block_size = 0;
  if (code[0] == 0) {
    p.sink = code[2];
    if (code[3] >= 0) {
      p.window_kind = Window::kTokens;
      p.window = code[3];
    } else if (code[4] >= 0) {
      p.window_kind = Window::kBlocks;
      p.window = code[4];
    }
    p.stride = code[5];
    block_size = code[6];
    if (p.stride != 0) {  // reduced, so that phase_step * head cannot overflow
      p.phase_step = code[7] % p.stride;
      p.phase_offset = code[8] % p.stride;
    }
  } else {
    p.mask_rows = mask_rows;
    p.mask_heads = code[2];
    p.mask_q_blocks = code[3];
    p.mask_cols = mask_cols;
    p.mask_k_blocks = code[4];
    block_size = code[5];
  }
  while ((1 << p.log2_block) < block_size) ++p.log2_block;
  return p;
}

}  // namespace longgen
