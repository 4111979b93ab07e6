// Hopper's decode kernel with as many thread blocks as multiprocessors, among which all that there
// is to read is shared out evenly, however many tiles there are and however long each is.
//
// A block attends to one piece of a tile after another. The warps that do so never wait for each
// other in between: each asks for its first chunks of the next piece as it attends to its last of
// one. Other warps bring queries, merge what has been found, and meet the blocks that share a tile
// in global memory, where a fence takes microseconds while memory is busy.
#pragma once

#include "arch/sm90/registers.cuh"
#include "decode/combine.cuh"
#include "sm90/decode/work.cuh"

namespace longgen::sm90 {

// Where the blocks that share a task's tile meet.
template <typename Traits>
__device__ __forceinline__ auto shared_tile(const DecodeParams& params, const Task& task) {
  const auto place_of = [&piece = task.piece](int p) { return piece.place_of(p); };
  return decode::SharedTile<Traits, decltype(place_of)>(params, task.tile, task.piece.part,
                                                        task.piece.parts, place_of);
}

// A warp writes its task there, where it has read the one before.
__device__ __forceinline__ void note(Task& there, const Task& task) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) there = task;
  __syncwarp();
}

// What the merging warps do. What the last piece gives is left to the others, who have nothing else
// to do then.
template <typename Traits>
__device__ __forceinline__ void merge_pieces(const DecodeParams& params,
                                             typename Traits::Shared& shared) {
  constexpr decode::NamedTeam<Traits::kMergeBarrier, 32 * Traits::kMergers, Traits::kAttendThreads>
      kTeam;
  const int warp = decode::uniform(kTeam.index() / 32);
  const auto found = [&](int w) -> typename Traits::Found& { return shared.found[w]; };
  const auto task = [&](int i) -> Task& { return shared.merged_tasks[warp][i % 3]; };
  const auto ticket = [&](int i) { return decode::ticket_of(params, task(i).tile); };
  const auto factors = [&](int i) {
    return typename Traits::Factors(params, task(i).tile.kv_head);
  };
  CacheSlots slots(params.cache);
  wait_for_previous_kernels();
  Work<Traits> work(params);
  // Takes the next task, number i, and asks for its queries, but the first one's.
  const auto take = [&](int i) {
    const Task next = work.take(params, slots);
    note(task(i), next);
    if (i > 0) Inputs<Traits, Traits::kMergers>(params, next.tile, warp).load(shared.inputs[i % 2]);
  };
  const auto let_start = [&](int i) {
    wait_for_copies();
    shared.meeting.let_start(i);
  };
  if (work.empty()) return;
  int i = 0;
#pragma unroll 1
  for (; i < 2 && !work.empty(); ++i) take(i);
  bool more = i == 2;
  if (more) let_start(1);
#pragma unroll 1
  for (i = 0; more; ++i) {
    shared.meeting.wait_for_ends(i);
    shared_tile<Traits>(params, task(i)).merge_warps(kTeam, factors(i), found);
    shared.meeting.let_store();
    more = !work.empty();
    if (more) take(i + 2);
    if (task(i).piece.parts > 1 && decode::is_last(kTeam, ticket(i), task(i).piece.parts))
      shared_tile<Traits>(params, task(i)).merge_parts(kTeam, factors(i));
    if (more) let_start(i + 2);
  }
  // Watches whether the blocks that share the last tile end before this one.
  const int others = task(i).piece.parts - 1;
  if (others == 0 || warp > 0) return;
#pragma unroll 1
  while (!shared.meeting.have_all_ended(i)) {
    if (decode::tickets_taken(ticket(i)) == others) return shared.meeting.say_others_ended();
  }
}

// What the other warps do.
template <typename Traits>
__device__ __forceinline__ void attend_to_pieces(const DecodeParams& params, const CacheMaps& maps,
                                                 typename Traits::Shared& shared) {
  using Block = decode::NamedTeam<Traits::kAttendBarrier, Traits::kAttendThreads>;
  const int warp = decode::uniform(threadIdx.x / 32);
  const auto found = [&](int w) -> typename Traits::Found& { return shared.found[w]; };
  CacheSlots slots(params.cache);
  Task task{};
  BulkStream<Traits> stream(params, maps, slots, task.tile, shared);
  Work<Traits> work;
  bool more, is_final;
  // Of no task, then one task after another: what is done before the first is done here for all, so
  // that its instructions need not be brought again while memory is busy.
  int i = -1;
#pragma unroll 1
  for (;; ++i) {
    if (i < 0) {
      // The lengths before the kernels ahead have ended are most often those after; not so with
      // pages, which they may move without a trace.
      if (params.cache.block_table != nullptr) wait_for_previous_kernels();
      work = Work<Traits>(params);
    } else {
      shared.meeting.wait_for_start(i);
      stream.begin_task(i);
      stream.append(task.old, task.end);
    }
    const typename Traits::Factors factors(params, task.tile.kv_head);
    WarpRows<Traits> rows(params, task.tile, factors, task.old + params.q_offset);
    stream.run(task.old, rows, [&](int busy) {
      more = !work.empty();
      Task next{};
      if (more) {
        next = work.take(params, slots);
        stream.prepare(next.tile, next.piece.pairs, next.old < next.end, next.turn);
        note(shared.last_tasks[warp], next);
      }
      Lengths now;
      if (i < 0) {
        const Inputs<Traits, Traits::kWarps> inputs(params, next.tile, warp);
        wait_for_previous_kernels();
        now = work.lengths(params);
        if (more) inputs.load(shared.inputs[0]);
      }
      if (more) stream.start_keys(busy);
      if (i < 0) {
        is_final = work.are_same(params, now);
        if (more && is_final) {
          wait_for_copies();
          shared.meeting.let_start_first();
        }
      }
      if (more) stream.start_values(busy);
    });
    if (i >= 0) {
      shared.meeting.wait_to_store(i);
      rows.store(found(warp));
      shared.meeting.end();
    } else if (!is_final) {
      if (more) stream.drop();
      --i;
      continue;
    } else if (!more) {
      return;
    }
    if (!more) break;
    task = shared.last_tasks[warp];
  }
  const Task& last = shared.last_tasks[warp];
  const typename Traits::Factors factors(params, last.tile.kv_head);
  const auto tile = shared_tile<Traits>(params, last);
  // Whether the other blocks of the tile have ended, as the merging warp has seen by now: then this
  // one need not write what it has found for another to read.
  const bool is_last = Block::any(threadIdx.x == 0 && shared.meeting.have_others_ended());
  tile.merge_block(Block(), is_last, factors, found);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    persistent_decode_kernel(const __grid_constant__ DecodeParams params,
                             const __grid_constant__ CacheMaps maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);

  const int warp = decode::uniform(threadIdx.x / 32);
  if (warp < Traits::kWarps) BulkStream<Traits>::set_up(maps, shared, warp);
  if (warp == Traits::kWarps) shared.meeting.set_up();
  __syncthreads();
  let_next_kernel_start();
  if (warp >= Traits::kWarps) {
    if constexpr (Traits::kMergeRegisters > 0) give_registers<Traits::kMergeRegisters>();
    merge_pieces<Traits>(params, shared);
  } else {
    if constexpr (Traits::kMergeRegisters > 0) take_registers<Traits::kAttendRegisters>();
    attend_to_pieces<Traits>(params, maps, shared);
  }
  if (!params.new_tokens.advance) return;
  // No warp of this block will read the lengths any more. The last block to come here adds the new
  // tokens to them.
  __syncthreads();
  if (threadIdx.x == 0 && decode::take_ticket(params.tickets, gridDim.x) == gridDim.x - 1) {
#pragma unroll 1
    for (int i = 0; i < params.cache.batch; ++i)
      atomicAdd(params.cache.seqlens + i, decode::new_tokens(params.new_tokens, i));
  }
}

}  // namespace longgen::sm90
