// Thread block clusters: a barrier of all their threads, and reads of each other's shared memory.
// Empty for older architectures, where nothing launches clusters.
#pragma once

#include <cstdint>

namespace longgen::sm90 {

// Waits for all threads of the cluster; what they wrote to shared memory before is visible after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
#endif
}

// The address of block `rank`'s twin of an own variable in shared memory.
__device__ __forceinline__ uint32_t twin_address(const void* own, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
#endif
  return address;
}

__device__ __forceinline__ float load_twin(const float* own, int rank) {
  float x = 0.f;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.f32 %0, [%1];"
               : "=f"(x)
               : "r"(twin_address(own, rank))
               : "memory");
#endif
  return x;
}

__device__ __forceinline__ float4 load_twin(const float4* own, int rank) {
  float4 x{0.f, 0.f, 0.f, 0.f};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(twin_address(own, rank))
               : "memory");
#endif
  return x;
}

}  // namespace longgen::sm90
