// The producer warpgroup: one thread hands out items and keeps the tiles of Q and dO coming, three
// warps fetch K and V.
#pragma once

#include "arch/sm90/shared_copy.cuh"
#include "arch/sm90/tma.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

constexpr int kLoaderBarrier = 1;
constexpr int kFirstLoader = 32;  // the thread
constexpr int kLog2SmallestBox = 4;

// Copies one tile of query rows.
template <typename Traits>
__device__ __forceinline__ void copy_queries(const CUtensorMap& map, Mbarrier& done, uint8_t* tile,
                                             int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Traits::kPanels; ++panel)
    copy_box(map, done, tile + panel * Traits::kQueryPanelBytes, panel * 64, row, head, batch);
}

// The query tiles in places `first` to `last` - 1 of the stream's head.
template <typename Traits>
__device__ __forceinline__ void stream_queries(const AttentionBwdParams& params,
                                               const CUtensorMap& q_map,
                                               const CUtensorMap& dout_map,
                                               typename Traits::Shared& shared, const Item& item,
                                               int first, int last) {
  auto& stream = shared.stream;
  uint32_t step = stream.step;
  for (int i = first; i < last; ++i, ++step) {
    const uint32_t q_stage = step % Traits::kQStages;
    Mbarrier& q_full = shared.q_full[q_stage];
    shared.q_empty[q_stage].wait((step / Traits::kQStages & 1) ^ 1);
    const int tile = stream.tiles.at(params.pattern, item.place(i, stream.tiles.count()));
    const int p_tile = (item.sequence.q_start & -Traits::kBlockM) + tile * Traits::kBlockM;
    Step& info = shared.steps[q_stage];
    info = {p_tile, stream.q_tile0 + tile, item.masks(p_tile, Traits::kBlockM)};
    q_full.arrive_and_expect(Traits::kQueryBytes + Traits::kStatsBytes);
    copy_queries<Traits>(q_map, q_full, shared.q[q_stage], item.q_row(p_tile), stream.head,
                         item.sequence.batch);
    const float* const stats =
        params.stats + static_cast<int64_t>(info.q_tile) * 2 * Traits::kStatsFloats;
    copy_bytes(stats, q_full, shared.lse[q_stage], Traits::kStatsBytes);

    const uint32_t stage = step % Traits::kDoutStages;
    Mbarrier& dout_full = shared.dout_full[stage];
    shared.dout_empty[stage].wait((step / Traits::kDoutStages & 1) ^ 1);
    dout_full.arrive_and_expect(Traits::kQueryBytes + Traits::kStatsBytes);
    copy_queries<Traits>(dout_map, dout_full, shared.dout[stage], item.q_row(info.p_tile),
                         stream.head, item.sequence.batch);
    copy_bytes(stats + Traits::kStatsFloats, dout_full, shared.delta[stage], Traits::kStatsBytes);
  }
  stream.step = step;
}

// One thread.
template <typename Traits>
__device__ void produce(const CUtensorMap& q_map, const CUtensorMap& dout_map,
                        typename Traits::Shared& shared) {
  const AttentionBwdParams& params = shared.params;
  auto& stream = shared.stream;
  stream.step = 0;
  stream.next_item = atomicAdd(params.next_item, 1);
  for (stream.n = 0;; ++stream.n) {
    Item& item = shared.items[stream.n % 2];
    shared.item_empty[stream.n % 2].wait((stream.n / 2 & 1) ^ 1);
    while (stream.next_item < params.plan.items &&
           !find_item<Traits::kBlockM>(params, stream.next_item, item))
      stream.next_item = atomicAdd(params.next_item, 1);
    item.stop = stream.next_item >= params.plan.items;
    shared.item_full[stream.n % 2].arrive();
    if (item.stop) return;

    stream.head = item.kv_head * params.plan.group;
    stream.skipped = item.first_step;
    stream.left = item.steps;
    while (stream.left > 0) {
      stream.q_tile0 = first_query_tile<Traits::kBlockM>(params, item.sequence, stream.head);
      stream.tiles = query_tiles<Traits::kBlockM>(params, item, stream.head);
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

// Asked for anew each time, so that nothing that follows from it lives from item to item.
__device__ __forceinline__ int loader_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - kFirstLoader;
}

// Where the keys of a tile are, and which queries see them.
template <typename Traits>
__device__ __forceinline__ void list_rows(const PatternParams& pattern, const Item& item,
                                          KeyRow* rows) {
#pragma unroll 1
  for (int row = loader_thread(); row < Traits::kBlockN; row += Traits::kLoaderThreads) {
    rows[row] = {-1, {kBeyond, 0}};
    if (!item.keys.owns(row)) continue;
    const int position = item.keys.position(pattern, item.keys.column0 + row);
    rows[row] = {item.k_row(position), item.keys.seen(pattern, position)};
    forget_registers();
  }
}

// The rows of a key tile, 16 bytes a thread; zeros where there is no key.
template <typename Traits>
__device__ __forceinline__ void load_rows(const void* data, const OutStrides& strides,
                                          const Item& item, const KeyRow* rows, uint8_t* tile) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kHeadDim / 8;
  constexpr int kRowsAtOnce = Traits::kLoaderThreads / kChunks;
  const int thread = loader_thread();
  const int chunk = thread % kChunks;
  const T* const first = static_cast<const T*>(data) + item.sequence.batch * strides.batch +
                         item.kv_head * strides.head + chunk * 8;
#pragma unroll 1
  for (int row = thread / kChunks; row < Traits::kBlockN; row += kRowsAtOnce) {
    const int k_row = rows[row].row;
    copy_16_bytes(shared_address(tile) + chunk / 8 * Traits::kKeyPanelBytes + row * 128 +
                      ((chunk % 8) ^ (row % 8)) * 16,
                  first + max(k_row, 0) * strides.seqlen, k_row >= 0);
  }
}

// The rows of a whole key tile, in boxes of consecutive positions: blocks, or parts of them. One
// warp, before it arrives at k_full and v_full.
template <typename Traits>
__device__ __forceinline__ void load_boxes(const AttentionBwdParams& params,
                                           const CUtensorMap& k_map, const CUtensorMap& v_map,
                                           const Item& item, typename Traits::Shared& shared) {
  const int lane = loader_thread();
  if (lane == 0) {
    shared.k_full.expect(Traits::kKeyBytes);
    shared.v_full.expect(Traits::kKeyBytes);
  }
  __syncwarp();
  const int log2_box = params.plan.log2_box;
  const int boxes = Traits::kBlockN >> log2_box;
  const int box = lane % boxes;
  const int panel = lane / boxes % Traits::kPanels;
  const int tensor = lane / boxes / Traits::kPanels;
  if (tensor > 1) return;
  const int position = item.keys.position(params.pattern, item.keys.column0 + (box << log2_box));
  copy_box(tensor == 0 ? k_map : v_map, tensor == 0 ? shared.k_full : shared.v_full,
           (tensor == 0 ? shared.k : shared.v) + panel * Traits::kKeyPanelBytes +
               (box << log2_box) * 128,
           panel * 64, item.k_row(position), item.kv_head, item.sequence.batch);
}

// Threads kFirstLoader and following. Keys come in boxes, or where blocks are small or rows not the
// tile's own, one row at a time, from wherever they are; rows that are not its own become zeros.
template <typename Traits>
__device__ void load_keys(const CUtensorMap& k_map, const CUtensorMap& v_map,
                          typename Traits::Shared& shared) {
  const AttentionBwdParams& params = shared.params;
  while (true) {
    const uint32_t n = shared.loads[loader_thread() / 32];
    const Item& item = shared.items[n % 2];
    shared.item_full[n % 2].wait(n / 2 & 1);
    if (item.stop) return;
    list_rows<Traits>(params.pattern, item, shared.rows[n % 2]);
    named_barrier_sync(kLoaderBarrier, Traits::kLoaderThreads);

    shared.keys_empty.wait((n & 1) ^ 1);
    if (params.plan.log2_box >= kLog2SmallestBox && item.keys.whole()) {
      if (loader_thread() < 32) load_boxes<Traits>(params, k_map, v_map, item, shared);
    } else {
      load_rows<Traits>(params.k, params.k_strides, item, shared.rows[n % 2], shared.k);
      forget_registers();
      load_rows<Traits>(params.v, params.v_strides, item, shared.rows[n % 2], shared.v);
      wait_for_copies();
      fence_async_proxy();
    }
    shared.k_full.arrive();
    shared.v_full.arrive();
    __syncwarp();
    if (loader_thread() % 32 == 0) shared.loads[loader_thread() / 32] = n + 1;
    shared.item_empty[n % 2].arrive();
    __syncwarp();
  }
}

}  // namespace longgen::sm90
