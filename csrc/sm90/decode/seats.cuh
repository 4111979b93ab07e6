// Which multiprocessors have the blocks of the decode kernel, where there are fewer blocks.
//
// The GPU is two halves, each with half of the bandwidth to memory, and which multiprocessors it
// leaves idle is chance: a half that is full is late then. So there are as many blocks as
// multiprocessors, each takes the seat with its multiprocessor's number, and who has a seat that is
// to stay idle has nothing to do. The host knows the halves, from l2_latencies.cu.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"

namespace longgen::sm90 {

// Each launch takes each seat once, which is counted: between launches all seats have the same
// count. Launches that count in one place must not take their seats at the same time.
class Seats {
  static constexpr int kCountBits = 24;  // after so many launches counts begin from 0 again
  static constexpr int kPatience = 256;  // times a tenth of a microsecond or two
  static constexpr int kRounds = 16;     // of all seats

 public:
  // `counts`: (1 + seats,), zeros before the first launch, of all seats together and of each.
  __device__ Seats(uint32_t* counts, int seats) : all_(counts), taken_(counts + 1), seats_(seats) {}

  // By one thread of each block. Its multiprocessor's seat is taken if another kernel holds some
  // multiprocessor for long, and two blocks come to this one instead, one after the other.
  __device__ __forceinline__ int take() {
    unsigned number;
    asm("mov.u32 %0, %%smid;" : "=r"(number));
    const unsigned own = number % seats_;
    launch_ = decode::take_ticket(all_, seats_ << kCountBits) / seats_;
    if (is_free(atomicAdd(taken_ + own, 1u))) return own;
    atomicSub(taken_ + own, 1u);
    for (unsigned i = 0, seat = own; i < kRounds * seats_; ++i) {
      seat = seat + 1 < seats_ ? seat + 1 : 0;
      const uint32_t count = decode::tickets_taken(taken_ + seat);
      if (is_free(count) && atomicCAS(taken_ + seat, count, count + 1) == count) return seat;
    }
    __trap();  // only if launches did: one round is enough otherwise
  }

  // Who has nothing to do stays until all have seats, as another block would come in its place; but
  // not for ever, if others cannot come before this one has left. By the thread that took the seat.
  __device__ __forceinline__ void stay() const {
    wait_for_previous_kernels();  // until then they hold multiprocessors
    for (int i = 0; i < kPatience && decode::tickets_taken(all_) / seats_ == launch_; ++i)
      __nanosleep(100);
  }

 private:
  __device__ __forceinline__ bool is_free(uint32_t count) const {
    return ((count ^ launch_) & ((1u << kCountBits) - 1)) == 0;
  }

  uint32_t *const all_, *const taken_;
  const uint32_t seats_;
  uint32_t launch_ = 0;
};

// The block that has a seat, of which there are as many as seats before it that do not stay idle.
// -1: this one does.
__device__ __forceinline__ int block_of_seat(const uint64_t (&idle)[4], int seat) {
  int block = (idle[seat / 64] >> seat % 64 & 1) != 0 ? -1 : seat;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int before = min(max(seat - 64 * i, 0), 64);  // seats that this word is about
    const uint64_t bits = before == 64 ? ~0ull : (1ull << before) - 1;
    if (block >= 0) block -= __popcll(idle[i] & bits);
  }
  return block;
}

// Returns which block this one is, or less than 0 if it has nothing to do.
__device__ __forceinline__ int take_seat(const DecodeParams& params, int& shared_block) {
  Seats seats(params.seat_counts, params.seats);
  if (threadIdx.x == 0) shared_block = block_of_seat(params.idle_seats, seats.take());
  __syncthreads();
  const int block = shared_block;
  if (block < 0) {
    let_next_kernel_start();
    if (threadIdx.x == 0) seats.stay();
  }
  return block;
}

}  // namespace longgen::sm90
