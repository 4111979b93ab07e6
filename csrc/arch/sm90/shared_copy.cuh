// Ordinary asynchronous copies into shared memory, 16 or 4 bytes a thread; loads and stores of
// matrix fragments.
#pragma once

#include "arch/sm90/barrier.cuh"

namespace longgen::sm90 {

// Copies 16 bytes, or writes zeros where there is nothing to copy.
__device__ __forceinline__ void copy_16_bytes(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(exists ? 16 : 0)
               : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void copy_4_bytes(uint32_t shared, const void* global, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(exists ? 4 : 0)
               : "memory");
}

// Until all of this thread's are done.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// 16 and 8 bytes from and to shared memory.
__device__ __forceinline__ void load_shared_16_bytes(uint32_t* r, uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void load_shared_8_bytes(uint32_t* r, uint32_t shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t shared, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(x.x), "r"(x.y) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements, rows to rows: of each a thread gets two
// neighbouring elements of row lane / 4. Lanes 8m to 8m + 7 give the addresses of the rows (16
// bytes) of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared)
               : "memory");
}

// The same, transposed: two neighbouring elements of column lane / 4.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared)
               : "memory");
}

// Stores four 8 x 8 matrices of 16-bit elements, transposed. A thread holds, of each, two
// neighbouring elements of row lane / 4; lanes 8m to 8m + 7 give the addresses of the stored rows
// (16 bytes) of matrix m.
__device__ __forceinline__ void store_transposed(uint32_t shared, uint32_t m0, uint32_t m1,
                                                 uint32_t m2, uint32_t m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

// The same, not transposed: lanes 8m to 8m + 7 give the addresses of the rows of matrix m.
__device__ __forceinline__ void store_matrices(uint32_t shared, uint32_t m0, uint32_t m1,
                                               uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

}  // namespace longgen::sm90
