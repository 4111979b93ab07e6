// How thread blocks share out items that stand in a row.
#pragma once

#include <cuda_runtime.h>

namespace longgen::decode {

// Items from first to before last.
struct Share {
  int first, last;
};

// Each block has a run of neighbours. Some have one more than the others: the first ones.
struct Shares {
  int each, longer;  // items of a block; blocks that have one more

  static __host__ __device__ __forceinline__ Shares of(int items, int blocks) {
    const int each = unsigned(items) / unsigned(blocks);
    return {each, items - each * blocks};
  }
  __host__ __device__ __forceinline__ Share of_block(int block) const {
    const int first = block * each + min(block, longer);
    return {first, first + each + (block < longer ? 1 : 0)};
  }
  // The block that has the item.
  __host__ __device__ __forceinline__ int block_of(int item) const {
    const int in_longer = longer * (each + 1);
    return item < in_longer ? quotient(item, each + 1) : longer + quotient(item - in_longer, each);
  }

 private:
  // By floats, in a fraction of the time that integers take. They are off by one at most, where
  // there are less than two million blocks.
  static __host__ __device__ __forceinline__ int quotient(int x, int divisor) {
#ifdef __CUDA_ARCH__
    const float inverse = __frcp_rn(float(divisor));
#else
    const float inverse = 1.f / float(divisor);
#endif
    const int guess = int(float(x) * inverse), rest = x - guess * divisor;
    return guess + (rest >= divisor ? 1 : 0) - (rest < 0 ? 1 : 0);
  }
};

}  // namespace longgen::decode
