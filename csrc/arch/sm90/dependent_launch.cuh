// Programmatic dependent launch: a kernel that is launched so may start while the one before it in
// the stream still runs, if that one lets it. Empty for older architectures.
#pragma once

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

}  // namespace longgen::sm90
