// What small blocks do, where there is more than runs at once.
//
// The GPU is two halves (seats.cuh), of which some multiprocessors read faster than others. If
// blocks did whatever is next, the half whose blocks end at once would have more of the last round
// than the other, and end late. So each half does half of it.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "params.h"

namespace longgen::sm90 {

// Blocks take items in turn as they come, those of their half first. There are more blocks than
// items: as many as may leave one half with nothing.
class HalfItems {
  static constexpr int kPatience = 100;  // times a tenth of a microsecond or two

 public:
  __device__ __forceinline__ explicit HalfItems(const DecodeParams& params)
      : counts_(params.seat_counts), items_(params.items) {
    unsigned number;
    asm("mov.u32 %0, %%smid;" : "=r"(number));
    number %= params.seats;
    half_ = params.seat_bits[number / 64] >> number % 64 & 1;
  }

  // By one thread of each block: asks for an item of its half, and waits for the answer, which is
  // -1 if there is none.
  __device__ __forceinline__ uint32_t ask() const { return atomicAdd(counts_ + half_, 1u); }
  // What the answer says. Of the other half's items a block takes one if that does not come to take
  // them itself, as when other kernels hold its multiprocessors. -1: nothing is left.
  __device__ __forceinline__ int item(uint32_t answer) const {
    if (item_of(half_, answer) < items_) return item_of(half_, answer);
    const int other = 1 - half_;
    wait_for_previous_kernels();  // until then they hold multiprocessors
    for (int i = 0; i < kPatience && has_items(other); ++i) __nanosleep(100);
    if (!has_items(other)) return -1;
    const int item = item_of(other, atomicAdd(counts_ + other, 1u));
    return item < items_ ? item : -1;
  }

  // By one thread of each block that has taken something or nothing, before the next kernel may
  // start: that counts from 0 again.
  __device__ __forceinline__ void end_turn() const {
    if (!decode::counts_last(counts_ + 2, gridDim.x)) return;
    atomicExch(counts_, 0u);
    atomicExch(counts_ + 1, 0u);
    __threadfence();
  }

 private:
  // One half has the items with even numbers: of whole tiles and of splits each has as many.
  static __device__ __forceinline__ int item_of(int half, uint32_t answer) {
    return int(2 * answer) + half;
  }
  __device__ __forceinline__ bool has_items(int half) const {
    return item_of(half, decode::tickets_taken(counts_ + half)) < items_;
  }

  uint32_t* const counts_;  // (3,), items that either half has taken, blocks whose turn has ended
  const int items_;
  int half_;
};

}  // namespace longgen::sm90
