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
  const int first_block = task.piece.first_block;
  const auto place_of = [first_block](int p) { return place_of_part(first_block, p); };
  return decode::SharedTile<Traits, decltype(place_of)>(params, task.tile, task.piece.part,
                                                        task.piece.parts, place_of);
}

// What the merging warps do. What the last piece gives is left to the others, who have nothing else
// to do then.
template <typename Traits>
__device__ __forceinline__ void merge_pieces(const DecodeParams& params, LatestLengths& lengths,
                                             typename Traits::Shared& shared) {
  constexpr decode::NamedTeam<Traits::kMergeBarrier, 32 * Traits::kMergers, Traits::kAttendThreads>
      kTeam;
  const int warp = decode::uniform(kTeam.index() / 32);
  const auto found = [&](int w) -> typename Traits::Found& { return shared.found[w]; };
  const auto ticket = [&](const Task& task) { return decode::ticket_of(params, task.tile); };
  CacheSlots slots(params.cache);
  lengths.wait();
  Work<Traits> work(params, lengths.get());
  if (work.empty()) return;
  Task task = work.take(params, slots);
  int i = 0;
#pragma unroll 1
  for (; !work.empty(); ++i) {
    const Task next = work.take(params, slots);
    const Inputs<Traits, Traits::kMergers> inputs(params, next.tile, warp);
    inputs.load(shared.inputs[(i + 1) % 2]);
    wait_for_copies();
    shared.meeting.let_start(i + 1);
    shared.meeting.wait_for_ends(i);
    const typename Traits::Factors factors(params, task.tile.kv_head);
    const auto tile = shared_tile<Traits>(params, task);
    tile.merge_warps(kTeam, factors, found);
    shared.meeting.let_store();
    if (task.piece.parts > 1 && decode::is_last(kTeam, ticket(task), task.piece.parts))
      tile.merge_parts(kTeam, factors);
    task = next;
  }
  // Watches whether the blocks that share the last tile end before this one.
  if (task.piece.parts == 1 || warp > 0) return;
#pragma unroll 1
  while (!shared.meeting.have_all_ended(i)) {
    if (decode::tickets_taken(ticket(task)) == task.piece.parts - 1)
      return shared.meeting.say_others_ended();
  }
}

// What the other warps do.
template <typename Traits>
__device__ __forceinline__ void attend_to_pieces(const DecodeParams& params, const CacheMaps& maps,
                                                 LatestLengths& lengths,
                                                 typename Traits::Shared& shared) {
  using Block = decode::NamedTeam<Traits::kAttendBarrier, Traits::kAttendThreads>;
  const int warp = decode::uniform(threadIdx.x / 32);
  const auto found = [&](int w) -> typename Traits::Found& { return shared.found[w]; };
  CacheSlots slots(params.cache);
  Task task{}, next{};
  BulkStream<Traits> stream(params, maps, slots, task.tile, shared);
  Work<Traits> work;
  bool more;
  // Of no task, then one task after another: what is done before the first is done here for all, so
  // that its instructions need not be brought again while memory is busy.
  int i = -1;
#pragma unroll 1
  for (;; ++i) {
    if (i < 0) {
      work = Work<Traits>(params, lengths.get());
    } else {
      shared.meeting.wait_for_start(i);
      stream.begin_task(i);
      stream.append(task.old, task.end);
    }
    const typename Traits::Factors factors(params, task.tile.kv_head);
    WarpRows<Traits> rows(params, task.tile, factors, task.old + params.q_offset);
    stream.run(task.old, rows, [&] {
      more = !work.empty();
      if (more) {
        next = work.take(params, slots);
        stream.prepare(next.tile, next.piece.pairs, next.old < next.end, next.turn);
      }
      if (i < 0) {
        const Inputs<Traits, Traits::kWarps> inputs(params, next.tile, warp);
        lengths.wait();
        if (more) inputs.load(shared.inputs[0]);
      }
      return more;
    });
    if (i >= 0) {
      shared.meeting.wait_to_store(i);
      rows.store(found(warp));
      shared.meeting.end();
    } else if (lengths.have_changed()) {
      if (more) stream.drop();
      --i;
      continue;
    } else if (more) {
      wait_for_copies();
      shared.meeting.let_start_first();
    }
    if (!more) break;
    task = next;
  }
  if (i < 0) return;
  // Whether the other blocks of the tile have ended, as the merging warp has seen by now: then this
  // one need not write what it has found for another to read.
  const bool is_last = Block::any(threadIdx.x == 0 && shared.meeting.have_others_ended());
  const typename Traits::Factors factors(params, task.tile.kv_head);
  shared_tile<Traits>(params, task).merge_block(Block(), is_last, factors, found);
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
  LatestLengths lengths(params);
  if (warp >= Traits::kWarps) {
    if constexpr (Traits::kMergeRegisters > 0) give_registers<Traits::kMergeRegisters>();
    merge_pieces<Traits>(params, lengths, shared);
  } else {
    if constexpr (Traits::kMergeRegisters > 0) take_registers<Traits::kAttendRegisters>();
    attend_to_pieces<Traits>(params, maps, lengths, shared);
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
