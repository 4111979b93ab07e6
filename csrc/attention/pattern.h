// An attention pattern as a kernel gets it: plain numbers, the same that Python's AttentionPattern
// and BlockMask hold.
#pragma once

#include <cstdint>

namespace longgen {

enum class Window : int32_t { kNone, kTokens, kBlocks };

struct PatternParams {
  int32_t causal;
  Window window_kind;  // kNone: no limit, and no sink or strided blocks either
  int32_t window;      // in tokens or in blocks
  int32_t sink;
  int32_t stride;  // 0: no strided blocks
  int32_t log2_block;
  int32_t phase_step, phase_offset;  // both below stride
  // A block mask, or nullptr: CSR row offsets (heads * q_blocks + 1,), then the entries, ascending
  // in each row.
  const int32_t* mask_rows;
  int32_t mask_heads, mask_q_blocks;
  // The same by columns, (heads * k_blocks + 1,) offsets: what the backward pass reads.
  const int32_t* mask_cols;
  int32_t mask_k_blocks;
};

}  // namespace longgen
