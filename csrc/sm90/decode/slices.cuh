// How the blocks of a cluster share out the pairs of elements that they merge.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace longgen::sm90 {

// How many bits x takes.
__host__ __device__ __forceinline__ int bits_of(uint32_t x) {
#ifdef __CUDA_ARCH__
  return 32 - __clz(x);
#else
  return x == 0 ? 0 : 32 - __builtin_clz(x);
#endif
}

// Each block has a run of 2^log2 pairs, the last ones fewer or none. No division: what a call does
// once it does slowly.
struct Slices {
  int pairs, log2;
  static __host__ __device__ __forceinline__ Slices of(int pairs, int blocks) {
    return {pairs, max(bits_of(pairs - 1) - (bits_of(blocks) - 1), 0)};
  }
  __host__ __device__ __forceinline__ int first(int rank) const { return rank << log2; }
  __host__ __device__ __forceinline__ int owner(int pair) const { return pair >> log2; }
  __host__ __device__ __forceinline__ int size(int rank) const {
    return max(min(1 << log2, pairs - first(rank)), 0);
  }
};

}  // namespace longgen::sm90
