// Writing new tokens to a cache.
#pragma once

#include "attention/cache_slots.cuh"
#include "decode/fp8.cuh"
#include "params.h"

namespace longgen::decode {

// How many new tokens a sequence is said to get, and how many it gets of these.
__device__ __forceinline__ int said_tokens(const NewTokensParams& tokens, int sequence) {
  return tokens.counts == nullptr ? tokens.n : __ldcg(tokens.counts + sequence);
}
__device__ __forceinline__ int tokens_of_said(const NewTokensParams& tokens, int said) {
  return min(max(said, 0), tokens.n);
}
__device__ __forceinline__ int new_tokens(const NewTokensParams& tokens, int sequence) {
  return tokens_of_said(tokens, said_tokens(tokens, sequence));
}

// A warp writes key and value of a sequence's new token `i`, of T, to a slot of a cache of Cached.
template <typename T, typename Cached, int kHeadDim>
__device__ __forceinline__ void write_token(const CacheParams& cache, const CacheScales& scales,
                                            const NewTokensParams& tokens, int sequence,
                                            int kv_head, int i, int slot) {
  const int64_t target = slot_offset(cache, sequence, kv_head, slot);
  if (target < 0) return;
  const int64_t source =
      sequence * tokens.strides.batch + i * tokens.strides.seqlen + kv_head * tokens.strides.head;
  constexpr int kPieces = kHeadDim / 8;  // of 16 bytes of T
  for (int piece = threadIdx.x % 32; piece < 2 * kPieces; piece += 32) {
    const bool is_key = piece < kPieces;
    const int column = piece % kPieces * 8;
    const T* const from = static_cast<const T*>(is_key ? tokens.k : tokens.v) + source + column;
    Cached* const to = static_cast<Cached*>(is_key ? cache.k : cache.v) + target + column;
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    if constexpr (sizeof(Cached) == 1) {
      const float scale = (is_key ? scales.k : scales.v)[kv_head];
      *reinterpret_cast<uint2*>(to) = to_fp8<T>(x, 1.f / scale);
    } else {
      *reinterpret_cast<uint4*>(to) = x;
    }
  }
}

// Counts up to `blocks`, and then from 0 again. Orders nothing.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* ticket, uint32_t blocks) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(ticket)), "r"(blocks - 1)
               : "memory");
  return before;
}

// How many have counted up, or fewer. Who sees all but itself sees all that those wrote before.
__device__ __forceinline__ uint32_t tickets_taken(const uint32_t* ticket) {
  uint32_t taken;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(taken)
               : "l"(__cvta_generic_to_global(ticket))
               : "memory");
  return taken;
}

// Counts up to `blocks`, and then from 0 again; returns whether this was the last. Who gets true
// sees all that the others wrote before.
__device__ __forceinline__ bool counts_last(uint32_t* ticket, uint32_t blocks) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(ticket)), "r"(blocks - 1)
               : "memory");
  return before == blocks - 1;
}

// Threads that work together: a block, some of its warps.
template <int kThreads>
struct BlockTeam {
  static __device__ __forceinline__ int index() { return threadIdx.x; }
  static __device__ __forceinline__ int size() { return kThreads; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x); }
};
template <int kBarrier, int kThreads, int kFirst = 0>
struct NamedTeam {  // of the threads of a block, those from the first on
  static __device__ __forceinline__ int index() { return threadIdx.x - kFirst; }
  static __device__ __forceinline__ int size() { return kThreads; }
  static __device__ __forceinline__ void sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
  }
  static __device__ __forceinline__ bool any(bool x) {
    uint32_t any;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "bar.red.or.pred p, %2, %3, p;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(any)
        : "r"(uint32_t(x)), "n"(kBarrier), "n"(kThreads)
        : "memory");
    return any != 0;
  }
};

// The same for a team of each block, with what all its threads wrote.
template <typename Team>
__device__ __forceinline__ bool is_last(Team team, uint32_t* ticket, uint32_t blocks) {
  team.sync();
  return team.any(team.index() == 0 && counts_last(ticket, blocks));
}

}  // namespace longgen::decode
