// The lengths that a block of Hopper's decode kernel works from, and may have read too early.
#pragma once

#include "decode/append.cuh"
#include "params.h"

namespace longgen::sm90 {

// Of a sequence: its length, and how many new tokens it is said to get. As read: whatever is
// computed from them waits for them.
struct Lengths {
  int old, said;

  __device__ __forceinline__ bool operator!=(const Lengths& other) const {
    return old != other.old || said != other.said;
  }
  __device__ __forceinline__ int end(const NewTokensParams& tokens) const {
    return old + decode::tokens_of_said(tokens, said);
  }
};
__device__ __forceinline__ Lengths read_lengths(const DecodeParams& params, int sequence) {
  return {__ldcg(params.cache.seqlens + sequence),
          decode::said_tokens(params.new_tokens, sequence)};
}

}  // namespace longgen::sm90
