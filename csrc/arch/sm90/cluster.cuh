// Thread block clusters: blocks that run at the same time and write to each other's shared memory.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"

namespace longgen::sm90 {

// All threads of all blocks of the cluster. After the wait all have initialised the mbarriers that
// they fenced (fence_barrier_init) before they arrived.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to what lies at `shared` in block `rank` of the cluster, and counts its 8 bytes as
// complete in the mbarrier that lies there at `done`.
__device__ __forceinline__ void store_remote(float2* shared, Mbarrier& done, int rank, float2 x) {
  asm volatile(
      "{\n"
      ".reg .u32 remote, barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [remote], {%3, %4}, "
      "[barrier];\n"
      "}\n" ::"r"(shared_address(shared)),
      "r"(shared_address(&done)), "r"(rank), "f"(x.x), "f"(x.y)
      : "memory");
}

}  // namespace longgen::sm90
