// Sizes and the shared-memory plan of the decode kernel.
#pragma once

#include <cstdint>

#include "attention/cache_slots.cuh"

namespace longgen::decode {

template <typename T_, int kHeadDim_, int kRowGroups_>
struct DecodeTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kRows = 16 * kRowGroups;  // of the query: tokens times heads of a group
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMaxStages = 3;
  static constexpr int kMinStages = 2;
  // Output accumulators are kRowGroups * kHeadDim / 2 registers a thread.
  static_assert(kRowGroups * kHeadDim <= 256, "more accumulators than registers");
  static constexpr bool kQInRegisters = kRowGroups * kHeadDim <= 128;

  // 16 bytes of padding put the eight rows that ldmatrix reads at once into different banks.
  static constexpr int kStride = kHeadDim + 8;
  static_assert(kHeadDim % 32 == 0, "copies of 16 bytes are spread evenly over a warp");
  static_assert((kStride / 8) % 2 == 1,
                "eight rows of an odd number of 16 bytes: no bank conflict");
  static_assert(sizeof(T) == 2, "matrix instructions of 16-bit types");

  // Each warp streams chunks of its own through its own stages; nobody else waits for them.
  struct Stage {
    alignas(16) T k[kChunk * kStride];
    T v[kChunk * kStride];
  };
  struct Seen {  // query positions that see a token: first and last
    int first, last;
  };
  // At the end the stages hold the warps' outputs instead.
  static constexpr int kOutStride = kHeadDim + 8;
  static_assert(kRows * kOutStride * sizeof(float) <= kMinStages * sizeof(Stage),
                "a warp's output fits into its stages");
  struct Fixed {
    alignas(16) T q[kRows * kStride];
    alignas(16) Seen seen[kWarps][kMaxStages][kChunk];
    float maximum[kWarps][kRows];
    float sum[kWarps][kRows];
  };
  static constexpr int shared_bytes(int stages) {
    return sizeof(Fixed) + kWarps * stages * sizeof(Stage);
  }
};

}  // namespace longgen::decode
