// Sizes and the shared-memory plan of the decode kernel.
#pragma once

#include <cstdint>

#include "attention/cache_slots.cuh"
#include "decode/found.cuh"
#include "decode/tile.cuh"

namespace longgen::decode {

template <typename T_, int kHeadDim_, int kOctets_>
struct DecodeTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kOctets = kOctets_;
  static constexpr int kRows = 8 * kOctets;  // of the query: tokens times heads of a group
  // One block fills a multiprocessor. A thread holds a chunk's keys and values, kHeadDim / 2
  // registers, Q and the output, 3 kHeadDim / 8 each octet, and some 50 others.
  static constexpr int kWarps = kHeadDim * kOctets <= 64 ? 16 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kHeadDim % 32 == 0, "four lanes read 32 elements of a key at once");
  static_assert(sizeof(T) == 2, "matrix instructions of 16-bit types");

  static __device__ __forceinline__ int key_element(int i, int c) { return 32 * i + 8 * c; }

  using Factors = decode::Factors<T, T>;
  using Found = decode::Found<kRows, kHeadDim>;
  static constexpr int kEach = 4;          // elements of a row that a thread merges
  static constexpr int kPartsAtOnce = 16;  // of splits, that are read to be merged
  static constexpr int kSharedBytes = kWarps * sizeof(Found);
  static_assert(kSharedBytes <= 99 * 1024, "some GPUs give a block no more");
};

}  // namespace longgen::decode
