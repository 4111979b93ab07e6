// Programmatic dependent launch: a kernel that is launched so may start while the one before it in
// the stream still runs, if that one lets it. Empty for older architectures.
#pragma once

#include <cstdint>

namespace longgen::sm90 {

// When every block of this kernel has called it or ended, the next kernel may start. It promises
// nothing about what this kernel has written.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernels before have ended; what they wrote is visible then.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings bytes to the level-2 cache: a hint, which reads nothing. Both are multiples of 16.
__device__ __forceinline__ void prefetch_bytes(const void* data, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(data)),
               "r"(bytes));
#endif
}

}  // namespace longgen::sm90
