// dS in shared memory: queries by keys, a panel for the 64 keys of each math warpgroup.
#pragma once

#include "arch/sm90/shared_copy.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// Where in a tile the row lies whose address this thread of the warpgroup gives first.
template <typename Traits>
__device__ __forceinline__ uint32_t score_gradients_offset(int warpgroup, int thread) {
  const int matrix = thread % 32 / 8;
  const int query = matrix / 2 * 8 + thread % 8;
  const int chunk = thread / 32 * 2 + matrix % 2;
  return warpgroup * Traits::kQueryPanelBytes + query * 128 + (chunk ^ query % 8) * 16;
}

// A thread's registers 4c to 4c + 3: queries 16c and 16c + 8, of each the two halves of the warp's
// 16 keys.
template <int kSize>
__device__ __forceinline__ void store_score_gradients(const uint32_t (&ds)[kSize],
                                                      uint32_t address) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4)
    store_transposed(address + i / 4 * 16 * 128, ds[i], ds[i + 1], ds[i + 2], ds[i + 3]);
  __syncwarp();
}

}  // namespace longgen::sm90
