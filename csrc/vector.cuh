// Runs of elements that one thread loads and stores at once, computed on as fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace longgen {

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(float x) { return x; }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline float from_float(float x) {
  return x;
}

// kElems neighbouring elements of T. 16 bytes of them move in one memory instruction.
template <typename T, int kElems>
struct alignas(sizeof(T) * kElems) Vector {
  T elems[kElems];

  static constexpr int kBytes = sizeof(T) * kElems;
  static_assert(kBytes == 16 || kElems == 1, "a vector is one 16-byte access or one element");

  // Reads through the read-only path: nothing writes `source` while the kernel runs.
  __device__ static Vector load(const T* source) {
    Vector v;
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(&v) = __ldg(reinterpret_cast<const uint4*>(source));
    } else {
      v.elems[0] = __ldg(source);
    }
    return v;
  }

  __device__ void store(T* target) const {
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(this);
    } else {
      *target = elems[0];
    }
  }
};

}  // namespace longgen
