// Writing what another block reads soon.
#pragma once

#include <cstdint>

namespace longgen::sm80 {

// Writes values that the level-2 cache is to keep longer than what streams through it. Otherwise
// they go to memory meanwhile, and memory that turns from reading to writing and back is slower.
__device__ __forceinline__ void store_to_keep(void* global, const float (&x)[4]) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
      "st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, policy;\n"
      "}\n" ::"l"(__cvta_generic_to_global(global)),
      "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
      : "memory");
}
__device__ __forceinline__ void store_to_keep(void* global, float x, float y) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
      "st.global.L2::cache_hint.v2.f32 [%0], {%1, %2}, policy;\n"
      "}\n" ::"l"(__cvta_generic_to_global(global)),
      "f"(x), "f"(y)
      : "memory");
}

}  // namespace longgen::sm80
