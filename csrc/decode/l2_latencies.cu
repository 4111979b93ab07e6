// How many cycles each multiprocessor waits for each of some lines of L2.
//
// Atomic additions are done in that half of the GPU where the line's home is, which takes longer
// for multiprocessors in the other. Loads would not tell: L2 keeps copies for the other half.
#include "cuda_check.h"
#include "decode/append.cuh"
#include "params.h"

namespace longgen {
namespace {

constexpr int kTries = 4;      // the fastest counts: others may be waiting for the same line
constexpr int kEach = 2;       // blocks for each multiprocessor, so that none is left out
constexpr int kFirstStep = 7;  // lines, from where one multiprocessor begins to where the next does

__device__ __forceinline__ uint32_t cycles() {
  uint32_t now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  return now;
}

// Zero is there, which is waited for.
__device__ __forceinline__ uint32_t latency_of(uint32_t* line) {
  const uint32_t before = cycles();
  if (atomicAdd(line, 0u) != 0) __nanosleep(0);
  return cycles() - before;
}

__global__ void l2_latencies_kernel(L2LatencyParams params) {
  int number;
  asm("mov.u32 %0, %%smid;" : "=r"(number));
  for (int i = 0; i < params.lines && number < params.multiprocessors; ++i) {
    const int line = (i + number * kFirstStep) % params.lines;
    uint32_t* const there = params.memory + line * params.stride;
    uint32_t least = latency_of(there);
    for (int t = 1; t < kTries; ++t) least = min(least, latency_of(there));
    params.latencies[number * params.lines + line] = least;
  }
  __threadfence_system();
  uint32_t* const count = params.memory + params.lines * params.stride;
  if (decode::take_ticket(count, gridDim.x) < gridDim.x - 1) return;
  __threadfence_system();
  volatile int32_t* const has_ended = params.latencies + params.multiprocessors * params.lines;
  *has_ended = 1;
}

}  // namespace

void measure_l2_latencies(const L2LatencyParams& params) {
  l2_latencies_kernel<<<kEach * params.multiprocessors, 1, 0, params.stream>>>(params);
  LONGGEN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace longgen
