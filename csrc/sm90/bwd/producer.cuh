// The producer warpgroup: one thread hands out items and keeps the tiles of Q and dO coming, two
// warps fetch K and V.
#pragma once

#include "arch/sm90/shared_copy.cuh"
#include "arch/sm90/tma.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

constexpr int kLoaderBarrier = 1;

// Copies one tile of 64 query rows.
template <typename Traits>
__device__ __forceinline__ void copy_queries(const CUtensorMap& map, Mbarrier& done, uint8_t* tile,
                                             int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel)
    copy_box(map, done, tile + panel * Traits::kQueryPanelBytes, panel * 64, row, head, batch);
}

// The query tiles `first` to `last` - 1 of the stream's head.
template <typename Traits>
__device__ __forceinline__ void stream_queries(const AttentionBwdParams& params,
                                               const CUtensorMap& q_map,
                                               const CUtensorMap& dout_map,
                                               typename Traits::Shared& shared, const Item& item,
                                               int first, int last) {
  Stream& stream = shared.stream;
  uint32_t step = stream.step;
  for (int i = first; i < last; ++i, ++step) {
    const uint32_t q_stage = step % Traits::kQStages;
    Mbarrier& q_full = shared.q_full[q_stage];
    shared.q_empty[q_stage].wait((step / Traits::kQStages & 1) ^ 1);
    const int tile = stream.tiles[i];
    const int p_tile = (item.sequence.q_start & -Traits::kBlockM) + tile * Traits::kBlockM;
    const bool masked = p_tile < stream.full_lo || p_tile + Traits::kBlockM > stream.full_hi;
    Step& info = shared.steps[q_stage];
    info = {p_tile, stream.q_tile0 + tile, masked};
    q_full.arrive_and_expect(Traits::kQueryBytes);
    copy_queries<Traits>(q_map, q_full, shared.q[q_stage], item.q_row(p_tile), stream.head,
                         item.sequence.batch);

    const uint32_t stage = step % Traits::kDoutStages;
    Mbarrier& dout_full = shared.dout_full[stage];
    shared.dout_empty[stage].wait((step / Traits::kDoutStages & 1) ^ 1);
    dout_full.arrive_and_expect(Traits::kQueryBytes + Traits::kStatsBytes);
    copy_queries<Traits>(dout_map, dout_full, shared.dout[stage], item.q_row(info.p_tile),
                         stream.head, item.sequence.batch);
    copy_bytes(params.stats + static_cast<int64_t>(info.q_tile) * 2 * Traits::kBlockM, dout_full,
               shared.stats[stage], Traits::kStatsBytes);
  }
  stream.step = step;
}

// One thread.
template <typename Traits>
__device__ void produce(const AttentionBwdParams& params, const CUtensorMap& q_map,
                        const CUtensorMap& dout_map, typename Traits::Shared& shared) {
  Stream& stream = shared.stream;
  stream.step = 0;
  stream.next_item = atomicAdd(params.next_item, 1);
  for (stream.n = 0;; ++stream.n) {
    Item& item = shared.items[stream.n % 2];
    shared.item_empty[stream.n % 2].wait((stream.n / 2 & 1) ^ 1);
    while (stream.next_item < params.plan.items && !find_item(params, stream.next_item, item))
      stream.next_item = atomicAdd(params.next_item, 1);
    item.stop = stream.next_item >= params.plan.items;
    shared.item_full[stream.n % 2].arrive();
    if (item.stop) return;

    const PatternParams& pattern = params.pattern;
    stream.full_lo = kBeyond;
    stream.full_hi = 0;
    if (item.steps > 0 && item.keys.owns(0) && item.keys.owns(Traits::kBlockN - 1)) {
      stream.full_lo = pattern.causal ? item.keys.last_position(pattern) : -kBeyond;
      stream.full_hi = item.keys.seen_until(pattern, item.keys.first_position(pattern));
    }
    stream.head = item.kv_head * params.plan.group;
    stream.skipped = item.first_step;
    stream.left = item.steps;
    while (stream.left > 0) {
      stream.q_tile0 = first_query_tile(params, item.sequence, stream.head);
      stream.tiles = query_tiles(params, item, stream.head);
      forget_registers();
      const int first = min(stream.skipped, stream.tiles.count());
      const int last = min(stream.tiles.count(), stream.skipped + stream.left);
      stream.skipped -= first;
      stream.left -= last - first;
      stream_queries<Traits>(params, q_map, dout_map, shared, item, first, last);
      ++stream.head;
    }
    stream.next_item = atomicAdd(params.next_item, 1);
  }
}

// Threads 0 to kLoaderThreads - 1. Keys come one row at a time, from wherever they are; rows that
// are not the tile's own become zeros.
template <typename Traits>
__device__ void load_keys(const AttentionBwdParams& params, typename Traits::Shared& shared,
                          int thread) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes in a row
  constexpr int kRowsAtOnce = Traits::kLoaderThreads / kChunks;
  const int chunk = thread % kChunks;
  for (uint32_t n = 0;; ++n) {
    const Item& item = shared.items[n % 2];
    shared.item_full[n % 2].wait(n / 2 & 1);
    if (item.stop) return;
    const PatternParams& pattern = params.pattern;
    for (int row = thread; row < Traits::kBlockN; row += Traits::kLoaderThreads) {
      int k_row = -1;
      int2 seen{kBeyond, 0};
      if (item.keys.owns(row)) {
        const int position = item.keys.position(pattern, item.keys.column0 + row);
        k_row = item.k_row(position);
        seen = {pattern.causal ? position : -kBeyond, item.keys.seen_until(pattern, position)};
      }
      shared.rows[n % 2][row] = k_row;
      shared.seen[n % 2][row] = seen;
    }
    named_barrier_sync(kLoaderBarrier, Traits::kLoaderThreads);

    const auto first_row = [&](const void* data, const OutStrides& strides) {
      return static_cast<const T*>(data) + item.sequence.batch * strides.batch +
             item.kv_head * strides.head + chunk * 8;
    };
    const T* const k = first_row(params.k, params.k_strides);
    const T* const v = first_row(params.v, params.v_strides);
    shared.keys_empty.wait((n & 1) ^ 1);
#pragma unroll 1
    for (int row = thread / kChunks; row < Traits::kBlockN; row += kRowsAtOnce) {
      const int k_row = shared.rows[n % 2][row];
      const int source = max(k_row, 0);
      const uint32_t at =
          chunk / 8 * Traits::kKeyPanelBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
      copy_16_bytes(shared_address(shared.k) + at, k + source * params.k_strides.seqlen,
                    k_row >= 0);
      copy_16_bytes(shared_address(shared.v) + at, v + source * params.v_strides.seqlen,
                    k_row >= 0);
    }
    wait_for_copies();
    fence_async_proxy();
    shared.keys_full.arrive();
    __syncwarp();
    if (thread % 32 == 0) shared.item_empty[n % 2].arrive();
  }
}

}  // namespace longgen::sm90
