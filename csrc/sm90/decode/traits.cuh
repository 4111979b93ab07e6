// Sizes and the shared-memory plan of Hopper's decode kernel.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"
#include "attention/cache_slots.cuh"
#include "decode/warp_rows.cuh"

namespace longgen::sm90 {

template <typename T_, int kHeadDim_, int kOctets_>
struct DecodeTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kOctets = kOctets_;
  static constexpr int kRows = 8 * kOctets;  // of the query: tokens times heads of a group
  static constexpr int kWarps = kHeadDim <= 128 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMaxCluster = 8;  // blocks

  // A chunk's keys, and its values, are copied in boxes of 64 elements by 16 rows, swizzled over
  // 128 bytes; of a head_dim that is no multiple of 64 the last is half zeros.
  static constexpr int kBoxes = (kHeadDim + 63) / 64;
  static constexpr int kBoxBytes = kChunk * 128;
  static constexpr int kHalfBytes = kBoxes * kBoxBytes;  // keys or values
  static constexpr int kStageBytes = 2 * kHalfBytes;
  // 128 KB on their way in a multiprocessor: less leaves memory idle, more makes what a block waits
  // for first arrive later.
  static constexpr int kStages = 128 * 1024 / (kWarps * kStageBytes);

  // 16 bytes of the swizzled rows that eight neighbouring lanes read lie in different banks, but
  // for the odd load of head_dim 96.
  static __device__ __forceinline__ int key_element(int i, int c) {
    return i / 2 * 2 + 1 < kHeadDim / 32 ? 64 * (i / 2) + 16 * c + 8 * (i % 2) : 32 * i + 8 * c;
  }

  struct Inputs {
    uint4 queries[kHeadDim / 32][kOctets][32];  // as the lanes of a warp hold them
    uint4 new_token[2][kHeadDim / 8];           // the first one's key and value
  };
  using Found = decode::Found<kRows, kHeadDim>;
  struct Shared {
    alignas(1024) char ring[kWarps][kStages][kStageBytes];  // in the end a warp's Found
    Inputs inputs;
    // (block, pair of this block's slice): less than twice all pairs, as slices are powers of 2.
    float2 part_out[kRows * kBoxes * 64];
    float2 part_weights[kMaxCluster][kRows];
    Mbarrier merged;
    Mbarrier full[kWarps][kStages][2];  // of keys, of values
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024, "a multiprocessor has no more");
  static_assert(sizeof(Found) <= kStages * kStageBytes, "it takes the ring's place");
};

}  // namespace longgen::sm90
