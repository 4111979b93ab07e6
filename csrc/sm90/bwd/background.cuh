// What the warps that fetch keys do while they wait for the next item: they clear the sums of dQ
// that the pass over rows has left out, and turn sums that are complete into dQ. Both are traffic
// of memory, of which the matrix products leave most unused.
//
// Blocks agree on it through counters in memory (BwdProgress), in one direction each:
//
//   sums cleared -> `tiles_cleared` -> a producer streams a query tile -> its sums are added to
//   sums added to -> `items_done` -> sums are read
//
// On the left ordinary stores or reductions of several threads, which a barrier (of the warp, or an
// mbarrier) orders before one thread; its addition to the counter is a release at the scope of the
// GPU, cumulative over what it has seen. On the right a load of the counter that acquires, and
// behind it barriers again. All of it is the generic proxy, and passes the level-1 cache by.
//
// Nobody waits for a conversion: what the kernel has not converted when it ends the pass behind it
// does. A producer may wait for cleared sums, but the other warps of its block do not wait for it:
// they clear what nobody has taken, and what is taken is cleared without waiting for anything.
#pragma once

#include "sm90/bwd/gradients.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// A tile is converted in pieces: of each part of its dQ the 16 rows that one warp's accumulators
// held. Small enough that keys need not wait long for a warp at work.
constexpr int kPiecesOfTile = 2 * 4;

// Asked for anew each time: these warps have few registers.
__device__ __forceinline__ int lane_of_warp() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ int load_acquire(const int32_t* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Adds 1 to a counter behind everything that this thread has done or seen done.
__device__ __forceinline__ void add_release(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ bool sums_are_cleared(const AttentionBwdParams& params) {
  return load_acquire(&params.progress->tiles_cleared) >= params.plan.tiles_to_clear;
}

// An item of a KV head is done, or does not exist.
__device__ __forceinline__ void count_item(const AttentionBwdParams& params, int head) {
  if (params.plan.early_tiles == 0) return;
  add_release(&params.head_progress[head].items_done);
}

// Clears the sums of a query tile.
template <int kFloats, int kThreads>
__device__ __forceinline__ void clear_sums(float* sums, int thread) {
#pragma unroll 8
  for (int i = 0; i < kFloats / 4; i += kThreads)
    reinterpret_cast<float4*>(sums)[i + thread] = float4{0.f, 0.f, 0.f, 0.f};
}

// Takes and clears the sums of one query tile, with one warp. Returns whether there was one left.
template <typename Traits>
__device__ __forceinline__ bool clear_tile(const AttentionBwdParams& params, Background& work) {
  const bool none = work.all_taken;
  __syncwarp();
  if (none) return false;
  const int lane = lane_of_warp();
  const BwdPlan& plan = params.plan;
  int index = 0;
  if (lane == 0) {
    index = atomicAdd(&params.progress->tiles_taken, 1);
    work.all_taken = index >= plan.tiles_to_clear;
  }
  index = __shfl_sync(0xffffffff, index, 0);
  __syncwarp();
  if (index >= plan.tiles_to_clear) return false;
  const int head = plan.cleared_heads * plan.group + index / plan.clear_until;
  const int64_t tile = static_cast<int64_t>(head) * plan.q_tiles + index % plan.clear_until;
  clear_sums<Traits::kDqFloats, 32>(params.dq_sum + tile * Traits::kDqFloats, lane);
  __syncwarp();
  if (lane == 0) add_release(&params.progress->tiles_cleared);
  return true;
}

// Takes a piece of the first KV head that has some left, if its early tiles are complete; -1: there
// is none. One thread, always the same of a warp: what it has acquired it need not ask for again.
__device__ __forceinline__ int take_piece(const AttentionBwdParams& params, Background& work) {
  const BwdPlan& plan = params.plan;
  for (; work.head < plan.heads; ++work.head, work.complete = false) {
    BwdHeadProgress& progress = params.head_progress[work.head];
    // A tile that no item adds to is complete when it is cleared.
    if (!work.complete)
      work.complete =
          sums_are_cleared(params) && load_acquire(&progress.items_done) >= plan.early_items;
    if (!work.complete) return -1;
    const int piece = atomicAdd(&progress.pieces_taken, 1);
    if (piece < plan.group * plan.early_tiles * kPiecesOfTile) return piece;
  }
  return -1;
}

// 16 of a piece's columns, from 16 * round on.
template <typename Traits>
__device__ __forceinline__ void convert_columns(const AttentionBwdParams& params,
                                                const Background& work, int round) {
  using T = typename Traits::T;
  // Past the level-1 cache: other multiprocessors wrote it.
  const float4* const sums =
      reinterpret_cast<const float4*>(params.dq_sum) + work.sums + round * 2 * 128 + lane_of_warp();
  const float4 left = __ldcg(sums);
  const float4 right = __ldcg(sums + 128);
  const float scale = params.softmax_scale;
  // Two chunks of 8 columns in one row, then in the row 8 below.
  uint32_t words[4] = {
      pack<T>(left.x * scale, left.y * scale), pack<T>(right.x * scale, right.y * scale),
      pack<T>(left.z * scale, left.w * scale), pack<T>(right.z * scale, right.w * scale)};
  transpose_quad(words);
  const int lane = lane_of_warp();
  const int row = work.row + lane / 4 + lane % 4 / 2 * 8;
  if (row < 0 || row >= params.seqlen_q) return;
  T* const target = static_cast<T*>(params.dq) + work.dq +
                    static_cast<int64_t>(row) * params.q_heads * Traits::kHeadDim + round * 16 +
                    lane % 2 * 8;
  // At once, whatever the compiler makes of so few registers.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Takes and converts one piece, with one warp. Returns whether there was one.
template <typename Traits>
__device__ __forceinline__ bool convert_piece(const AttentionBwdParams& params, Background& work) {
  constexpr int kHeadDim = Traits::kHeadDim;
  if (lane_of_warp() == 0) {
    const BwdPlan& plan = params.plan;
    const int index = take_piece(params, work);
    work.found = index >= 0;
    if (work.found) {
      const int tile_of_group = index / kPiecesOfTile;
      const int head = work.head * plan.group + tile_of_group / plan.early_tiles;
      const int tile = tile_of_group % plan.early_tiles;
      const DqPart<kHeadDim> part(index / 4 % 2);
      work.row = tile * Traits::kBlockM - (params.q_start & (Traits::kBlockM - 1)) + part.row +
                 index % 4 * 16;
      work.sums =
          ((static_cast<int64_t>(head) * plan.q_tiles + tile) * Traits::kDqFloats + part.offset) /
              4 +
          index % 4 * 32;
      work.dq = (static_cast<int64_t>(head / params.q_heads) * params.seqlen_q * params.q_heads +
                 head % params.q_heads) *
                    kHeadDim +
                part.column;
    }
  }
  __syncwarp();
  const bool found = work.found;
  if (found) {
#pragma unroll 1
    for (int round = 0; round < 4; ++round) {
      convert_columns<Traits>(params, work, round);
      forget_registers();
    }
  }
  __syncwarp();
  return found;
}

}  // namespace longgen::sm90
