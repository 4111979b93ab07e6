// What is different about each multiprocessor: how long it waits for lines of L2, and how much it
// reads while all do.
//
// Atomic additions are done in that half of the GPU where the line's home is, which takes longer
// for multiprocessors in the other. Loads would not tell: L2 keeps copies for the other half.
//
// Each cluster of multiprocessors (CPC) gets as much when all read, so those of one that lacks a
// pair get more each. That shows only if each asks for so much at once that it waits for its
// cluster's share, as the decode kernel does; and in L2 as well as in memory.
#include "arch/sm90/tma.cuh"
#include "cuda_check.h"
#include "decode/append.cuh"
#include "params.h"

namespace longgen {
namespace {

// Latencies.
constexpr int kTries = 4;      // the fastest counts: others may be waiting for the same line
constexpr int kEach = 2;       // blocks for each multiprocessor, so that none is left out
constexpr int kFirstStep = 7;  // lines, from where one multiprocessor begins to where the next does
// Reading.
constexpr int kRunBytes = 8192;      // of a bulk copy
constexpr int kRuns = 20;            // at once: a multiprocessor holds one block of so many
constexpr uint32_t kCycles = 40000;  // long against how far apart they begin

__device__ __forceinline__ int multiprocessor() {
  int number;
  asm("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

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

__global__ void latencies_kernel(MultiprocessorParams params) {
  const int number = multiprocessor();
  for (int i = 0; i < params.lines && number < params.multiprocessors; ++i) {
    const int line = (i + number * kFirstStep) % params.lines;
    uint32_t* const there = params.zeros + line * params.stride;
    uint32_t least = latency_of(there);
    for (int t = 1; t < kTries; ++t) least = min(least, latency_of(there));
    params.latencies[number * params.lines + line] = least;
  }
}

struct Shared {
  alignas(128) char runs[kRuns][kRunBytes];
  sm90::Mbarrier full[kRuns];
};

// Blocks of one thread.
__global__ void rates_kernel(MultiprocessorParams params) {
  extern __shared__ __align__(128) char dynamic_shared[];
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  for (sm90::Mbarrier& full : shared.full) full.init(1);
  sm90::fence_barrier_init();

  const uint32_t runs = params.nbytes / kRunBytes;
  uint32_t next = blockIdx.x % runs;
  const auto read = [&](int i) {
    shared.full[i].arrive_and_expect(kRunBytes);
    sm90::copy_bytes(params.memory + int64_t(next) * kRunBytes, shared.full[i], shared.runs[i],
                     kRunBytes);
    next = (next + gridDim.x) % runs;
  };
  for (int i = 0; i < kRuns; ++i) read(i);
  uint32_t count = 0;
  const auto wait = [&](uint32_t run) { shared.full[run % kRuns].wait(run / kRuns % 2); };
  for (const uint32_t begin = cycles(); cycles() - begin < kCycles; ++count) {
    wait(count);
    read(count % kRuns);
  }
  for (int i = 0; i < kRuns; ++i) wait(count + i);

  const int number = multiprocessor();
  if (number < params.multiprocessors) params.rates[number] = count;
  __threadfence_system();
  if (!decode::counts_last(params.zeros + params.lines * params.stride, gridDim.x)) return;
  __threadfence_system();
  volatile int32_t* const are_there = params.are_there;
  *are_there = 1;
}

}  // namespace

void measure_multiprocessors(const MultiprocessorParams& params) {
  latencies_kernel<<<kEach * params.multiprocessors, 1, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("latencies_kernel");
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(rates_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          sizeof(Shared)));
  rates_kernel<<<params.multiprocessors, 1, sizeof(Shared), params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("rates_kernel");
}

}  // namespace longgen
