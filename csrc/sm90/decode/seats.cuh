// Which multiprocessors have the work of the decode kernel, where some have less than others.
//
// The GPU is two halves, each with half of the bandwidth to memory, and which multiprocessors it
// leaves idle is chance: a half that is full is late then. So there are as many blocks as run at
// once, each takes a seat of its multiprocessor, and what it has to do follows from that. The host
// knows the halves, from multiprocessors.cu.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"

namespace longgen::sm90 {

// Multiprocessors have kEach seats. Each launch takes each seat once, which is counted: between
// launches the counts of all multiprocessors are the same. Launches that count in one place must
// not take their seats at the same time.
template <int kEach>
class Seats {
  static constexpr int kCountBits = 23;  // after so many launches counts begin from 0 again
  static constexpr int kPatience = 256;  // times a tenth of a microsecond or two
  static constexpr int kRounds = 16;     // of all multiprocessors

 public:
  // `counts`: (1 + multiprocessors,), zeros before the first launch, of all together and of each.
  __device__ Seats(uint32_t* counts, int multiprocessors)
      : all_(counts), taken_(counts + 1), multiprocessors_(multiprocessors) {}

  // By one thread of each block. All of its multiprocessor's seats are taken if another kernel
  // holds some multiprocessor for long, and its blocks come to this one instead, after the others.
  // Returns the multiprocessor's number, and that times as many as there are before the seat.
  __device__ __forceinline__ int take() {
    unsigned number;
    asm("mov.u32 %0, %%smid;" : "=r"(number));
    const unsigned own = number % multiprocessors_;
    launch_ = decode::take_ticket(all_, all_seats() << kCountBits) / all_seats();
    const uint32_t place = place_of(atomicAdd(taken_ + own, 1u));
    if (place < kEach) return place * multiprocessors_ + own;
    atomicSub(taken_ + own, 1u);
    for (unsigned i = 0, other = own; i < kRounds * multiprocessors_; ++i) {
      other = other + 1 < multiprocessors_ ? other + 1 : 0;
      const uint32_t count = decode::tickets_taken(taken_ + other), free = place_of(count);
      if (free < kEach && atomicCAS(taken_ + other, count, count + 1) == count)
        return free * multiprocessors_ + other;
    }
    __trap();  // only if launches did: one round is enough otherwise
  }

  // Who has nothing to do stays until all have seats, as another block would come in its place; but
  // not for ever, if others cannot come before this one has left. By the thread that took the seat.
  __device__ __forceinline__ void stay() const {
    wait_for_previous_kernels();  // until then they hold multiprocessors
    for (int i = 0; i < kPatience && decode::tickets_taken(all_) / all_seats() == launch_; ++i)
      __nanosleep(100);
  }

 private:
  __device__ __forceinline__ uint32_t all_seats() const { return kEach * multiprocessors_; }
  // Of a multiprocessor's seats the next one, if so many have been taken; kEach or more: none.
  __device__ __forceinline__ uint32_t place_of(uint32_t count) const {
    return (count - kEach * launch_) & ((uint32_t{kEach} << kCountBits) - 1);
  }

  uint32_t *const all_, *const taken_;
  const uint32_t multiprocessors_;
  uint32_t launch_ = 0;
};

// How many multiprocessors before this one do not stay idle. -1: it does.
__device__ __forceinline__ int busy_before(const uint64_t (&idle)[4], int multiprocessor) {
  int busy = (idle[multiprocessor / 64] >> multiprocessor % 64 & 1) != 0 ? -1 : multiprocessor;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int before = min(max(multiprocessor - 64 * i, 0), 64);  // those that this word is about
    const uint64_t bits = before == 64 ? ~0ull : (1ull << before) - 1;
    if (busy >= 0) busy -= __popcll(idle[i] & bits);
  }
  return busy;
}

// Takes a seat, and writes what item its block has to do. If there are seats enough, as many of
// each multiprocessor have one as can be, and one more where it does not stay idle. Returns whether
// there is anything to do.
template <int kEach>
__device__ __forceinline__ bool take_seat(const DecodeParams& params, int& shared_item) {
  Seats<kEach> seats(params.seat_counts, params.seats);
  if (threadIdx.x == 0) {
    const int seat = seats.take(), place = kEach == 1 ? 0 : seat / params.seats;
    const int full = kEach == 1 ? 0 : params.items / params.seats;  // seats of each
    shared_item = place < full ? seat : -1;
    const int busy = busy_before(params.seat_bits, seat - place * params.seats);
    const int item = full * params.seats + busy;
    if (place == full && busy >= 0 && item < params.items) shared_item = item;
  }
  __syncthreads();
  if (shared_item >= 0) return true;
  let_next_kernel_start();
  if (threadIdx.x == 0) seats.stay();
  return false;
}

}  // namespace longgen::sm90
