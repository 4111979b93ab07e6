// Loads of data that are read once: past the level-1 cache.
#pragma once

#include <cstdint>

namespace longgen::sm80 {

// 16 bytes.
__device__ __forceinline__ void load_16_bytes(uint32_t* r, const void* global) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(__cvta_generic_to_global(global))
               : "memory");
}

// 8 bytes.
__device__ __forceinline__ void load_8_bytes(uint32_t* r, const void* global) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "l"(__cvta_generic_to_global(global))
               : "memory");
}

}  // namespace longgen::sm80
