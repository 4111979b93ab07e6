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
#define LONGGEN_OPERANDS_64                                                                       \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LONGGEN_NAMES_128                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGGEN_OPERANDS_128                                                                      \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),  \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),  \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),  \
      "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),  \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// One instruction shape: `A0` to `A6` are the names that follow the accumulators'. Both operands
// are K-major, or with kTransB B is N-major; `accumulate` false overwrites d.
#define LONGGEN_WGMMA(N, T, TYPE, A0, A1, A2, A3, A4, A5, A6)                                  \
  template <>                                                                                  \
  struct Wgmma<N, T> {                                                                         \
    template <bool kTransB>                                                                    \
    __device__ __forceinline__ static void ss(float (&d)[N / 2], uint64_t a, uint64_t b,       \
                                              bool accumulate) {                               \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A2                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                   " {" LONGGEN_NAMES_##N "}, " A0 ", " A1 ", p, 1, 1, 0, " A3 ";\n}\n"        \
                   : LONGGEN_OPERANDS_##N                                                      \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransB ? 1 : 0)); \
    }                                                                                          \
    template <bool kTransB>                                                                    \
    __device__ __forceinline__ static void rs(float (&d)[N / 2], const uint32_t (&a)[4],       \
                                              uint64_t b, bool accumulate) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " A5                                      \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE             \
                   " {" LONGGEN_NAMES_##N                                                      \
                   "}, "                                                                       \
                   "{" A0 ", " A1 ", " A2 ", " A3 "}, " A4 ", p, 1, 1, " A6 ";\n}\n"           \
                   : LONGGEN_OPERANDS_##N                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                     "r"(static_cast<int>(accumulate)), "n"(kTransB ? 1 : 0));                 \
    }                                                                                          \
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
