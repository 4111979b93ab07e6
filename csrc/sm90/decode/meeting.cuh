// How the warps of a persistent block that attend to keys meet those that merge what they find.
#pragma once

#include "arch/sm90/barrier.cuh"
#include "sm90/decode/task.cuh"

namespace longgen::sm90 {

// Of tasks numbered from 0. Each function is a warp's, all lanes together.
template <int kWarps, int kMergers>
class Meeting {
 public:
  // Once, by one warp, before all others.
  __device__ __forceinline__ void set_up() {
    if (threadIdx.x % 32 == 0) {
      first_start_.init(kWarps);
      for (Mbarrier& barrier : start_) barrier.init(kMergers);
      ends_.init(kWarps);
      merged_.init(kMergers);
      others_ended_.init(1);
      end_.init(kMergers);
      ends_first = false;
      fence_barrier_init();
    }
    __syncwarp();
  }

  // The warp has brought its share of the first task's query.
  __device__ __forceinline__ void let_start_first() { arrive(first_start_); }
  // The same of another task. It may be there while some warps have yet to begin the task before:
  // hence two barriers.
  __device__ __forceinline__ void let_start(int task) { arrive(start_[task % 2]); }
  __device__ __forceinline__ void wait_for_start(int task) {
    if (task == 0) {
      first_start_.wait(0);
    } else {
      start_[task % 2].wait((task - 1) / 2 % 2);
    }
  }

  // A warp has stored what it has found.
  __device__ __forceinline__ void end() { arrive(ends_); }
  __device__ __forceinline__ bool have_all_ended(int task) { return ends_.is_complete(task % 2); }
  __device__ __forceinline__ void wait_for_ends(int task) { ends_.wait(task % 2); }

  // That has been read.
  __device__ __forceinline__ void let_store() { arrive(merged_); }
  __device__ __forceinline__ void wait_to_store(int task) {
    if (task > 0) merged_.wait((task - 1) % 2);
  }

  // All other blocks that share the last task's tile have ended.
  __device__ __forceinline__ void say_others_ended() { arrive(others_ended_); }
  __device__ __forceinline__ bool have_others_ended() { return others_ended_.is_complete(0); }

  // All pieces but the last are merged.
  __device__ __forceinline__ void let_end() { arrive(end_); }
  __device__ __forceinline__ void wait_for_end() { end_.wait(0); }

  // The first task, if it is not the last one, and whether the block has been the last of those
  // that share its tile.
  Task first;
  bool ends_first;

 private:
  static __device__ __forceinline__ void arrive(Mbarrier& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier.arrive();
  }

  Mbarrier first_start_, start_[2], ends_, merged_, others_ended_, end_;
};

}  // namespace longgen::sm90
