// The bulk copy engine: tiles of (head_dim, seqlen, heads, batch) tensors into shared memory, and
// runs of bytes both ways.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "arch/sm90/barrier.cuh"

namespace longgen::sm90 {

__device__ __forceinline__ void prefetch_descriptor(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies one box whose first element has these coordinates; elements outside the tensor become 0.
__device__ __forceinline__ void copy_box(const CUtensorMap& map, Mbarrier& done, void* shared,
                                         int dim, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&done)), "r"(dim), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Copies a run of bytes: all three multiples of 16.
__device__ __forceinline__ void copy_bytes(const void* global, Mbarrier& done, void* shared,
                                           uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&done))
      : "memory");
}

// Adds floats in shared memory to others in memory, in no order with other additions; `bytes` is a
// multiple of 16. Whoever wrote them has to fence those writes.
__device__ __forceinline__ void add_floats(float* global, const float* shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(global),
      "r"(shared_address(shared)), "r"(bytes)
      : "memory");
}

// Waits until this thread's additions have read shared memory, or until they are done.
__device__ __forceinline__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void wait_for_additions() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace longgen::sm90
