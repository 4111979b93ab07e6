// Warpgroup matrix instructions: D (64 x N, fp32, registers) += A (64 x 16) B (16 x N), 16-bit
// types.
//
// A comes from shared memory (`mma_ss`) or registers (`mma_rs`), B from shared memory. Thread t of
// the warpgroup holds, for chunk j of 8 columns, d[4j + {0, 1}] of row 16 * (t / 32) + (t % 32) / 4
// and d[4j + {2, 3}] of the row 8 below, in columns 8j + 2 * (t % 4) + {0, 1}. Two neighbouring
// chunks, packed to 16 bit, are an A fragment.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "arch/pack.cuh"

namespace longgen::sm90 {

// Orders earlier register writes before the next wgmma that reads those registers.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across a wait.
template <int kSize>
__device__ __forceinline__ void pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Describes a shared-memory operand in panels of 64 16-bit elements (128 bytes) a row, swizzled
// over 128 bytes; `panel` bytes lie between panels along M or N and matter to transposed operands
// only.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t panel = 16) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(panel >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// The same operand, `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

template <int N, typename T>
struct Wgmma;

// The accumulators as the assembler names them, and as operands.
#define LONGGEN_NAMES_64                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGGEN_OPERANDS_64(mode)                                                                 \
  mode(d[0]), mode(d[1]), mode(d[2]), mode(d[3]), mode(d[4]), mode(d[5]), mode(d[6]), mode(d[7]), \
      mode(d[8]), mode(d[9]), mode(d[10]), mode(d[11]), mode(d[12]), mode(d[13]), mode(d[14]),    \
      mode(d[15]), mode(d[16]), mode(d[17]), mode(d[18]), mode(d[19]), mode(d[20]), mode(d[21]),  \
      mode(d[22]), mode(d[23]), mode(d[24]), mode(d[25]), mode(d[26]), mode(d[27]), mode(d[28]),  \
      mode(d[29]), mode(d[30]), mode(d[31])
#define LONGGEN_NAMES_128                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGGEN_OPERANDS_128(mode)                                                                \
  mode(d[0]), mode(d[1]), mode(d[2]), mode(d[3]), mode(d[4]), mode(d[5]), mode(d[6]), mode(d[7]), \
      mode(d[8]), mode(d[9]), mode(d[10]), mode(d[11]), mode(d[12]), mode(d[13]), mode(d[14]),    \
      mode(d[15]), mode(d[16]), mode(d[17]), mode(d[18]), mode(d[19]), mode(d[20]), mode(d[21]),  \
      mode(d[22]), mode(d[23]), mode(d[24]), mode(d[25]), mode(d[26]), mode(d[27]), mode(d[28]),  \
      mode(d[29]), mode(d[30]), mode(d[31]), mode(d[32]), mode(d[33]), mode(d[34]), mode(d[35]),  \
      mode(d[36]), mode(d[37]), mode(d[38]), mode(d[39]), mode(d[40]), mode(d[41]), mode(d[42]),  \
      mode(d[43]), mode(d[44]), mode(d[45]), mode(d[46]), mode(d[47]), mode(d[48]), mode(d[49]),  \
      mode(d[50]), mode(d[51]), mode(d[52]), mode(d[53]), mode(d[54]), mode(d[55]), mode(d[56]),  \
      mode(d[57]), mode(d[58]), mode(d[59]), mode(d[60]), mode(d[61]), mode(d[62]), mode(d[63])

// One instruction shape: `A0` to `A6` are the names that follow the accumulators'. Both operands
// are K-major, or with kTransA and kTransB M- and N-major; `accumulate` false overwrites d.
#define LONGGEN_WGMMA(N, T, TYPE, A0, A1, A2, A3, A4, A5, A6)                                      \
  template <>                                                                                      \
  struct Wgmma<N, T> {                                                                             \
    template <bool kTransA, bool kTransB>                                                          \
    __device__ __forceinline__ static void ss(float (&d)[N / 2], uint64_t a, uint64_t b,           \
                                              bool accumulate) {                                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2                                          \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
                   " {" LONGGEN_NAMES_##N "}, " A0 ", " A1 ", p, 1, 1, " A3 ", " A4 ";\n}\n"       \
                   : LONGGEN_OPERANDS_##N("+f")                                                    \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransA ? 1 : 0),      \
                     "n"(kTransB ? 1 : 0));                                                        \
    }                                                                                              \
    /* Overwrites d, which need not have a value: a product that follows others in flight must not \
       wait for what earlier computation left there. */                                            \
    template <bool kTransB>                                                                        \
    __device__ __forceinline__ static void ss_first(float (&d)[N / 2], uint64_t a, uint64_t b) {   \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LONGGEN_NAMES_##N   \
          "}, " A0 ", " A1 ", p, 1, 1, 0, " A2 ";\n}\n"                                            \
          : LONGGEN_OPERANDS_##N("=f")                                                             \
          : "l"(a), "l"(b), "n"(kTransB ? 1 : 0));                                                 \
    }                                                                                              \
    template <bool kTransB>                                                                        \
    __device__ __forceinline__ static void rs(float (&d)[N / 2], const uint32_t (&a)[4],           \
                                              uint64_t b, bool accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A5                                          \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
                   " {" LONGGEN_NAMES_##N                                                          \
                   "}, "                                                                           \
                   "{" A0 ", " A1 ", " A2 ", " A3 "}, " A4 ", p, 1, 1, " A6 ";\n}\n"               \
                   : LONGGEN_OPERANDS_##N("+f")                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                           \
                     "r"(static_cast<int>(accumulate)), "n"(kTransB ? 1 : 0));                     \
    }                                                                                              \
  }
LONGGEN_WGMMA(64, __half, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
LONGGEN_WGMMA(64, __nv_bfloat16, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
LONGGEN_WGMMA(128, __half, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
LONGGEN_WGMMA(128, __nv_bfloat16, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");

#undef LONGGEN_WGMMA
#undef LONGGEN_NAMES_64
#undef LONGGEN_OPERANDS_64
#undef LONGGEN_NAMES_128
#undef LONGGEN_OPERANDS_128

}  // namespace longgen::sm90
