// How the warps of a persistent block that attend to keys meet those that merge what they find.
#pragma once

#include "arch/sm90/barrier.cuh"

namespace longgen::sm90 {

// Of tasks numbered from 0. Each function is a warp's, all lanes together, and each lane arrives
// for itself: a lane that did for the others, after __syncwarp, would look like a race to
// racecheck.
template <int kWarps, int kMergers>
class Meeting {
 public:
  // Once, by one warp, before all others.
  __device__ __forceinline__ void set_up() {
    if (threadIdx.x % 32 == 0) {
      first_start_.init(32 * kWarps);
      for (Mbarrier& barrier : start_) barrier.init(32 * kMergers);
      ends_.init(32 * kWarps);
      merged_.init(32 * kMergers);
      others_ended_.init(32);
      fence_barrier_init();
    }
    __syncwarp();
  }

  // The warp has brought its share of the first task's query.
  __device__ __forceinline__ void let_start_first() { first_start_.arrive(); }
  // The same of another task. It may be there while some warps have yet to begin the task before:
  // hence two barriers.
  __device__ __forceinline__ void let_start(int task) { start_[task % 2].arrive(); }
  __device__ __forceinline__ void wait_for_start(int task) {
    if (task == 0) {
      first_start_.wait(0);
    } else {
      start_[task % 2].wait((task - 1) / 2 % 2);
    }
  }

  // A warp has stored what it has found.
  __device__ __forceinline__ void end() { ends_.arrive(); }
  __device__ __forceinline__ bool have_all_ended(int task) { return ends_.is_complete(task % 2); }
  __device__ __forceinline__ void wait_for_ends(int task) { ends_.wait(task % 2); }

  // That has been read.
  __device__ __forceinline__ void let_store() { merged_.arrive(); }
  __device__ __forceinline__ void wait_to_store(int task) {
    if (task > 0) merged_.wait((task - 1) % 2);
  }

  // All other blocks that share the last task's tile have ended.
  __device__ __forceinline__ void say_others_ended() { others_ended_.arrive(); }
  __device__ __forceinline__ bool have_others_ended() { return others_ended_.is_complete(0); }

 private:
  Mbarrier first_start_, start_[2], ends_, merged_, others_ended_;
};

}  // namespace longgen::sm90
