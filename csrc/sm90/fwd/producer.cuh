// The producer warpgroup. One warp keeps the tiles of Q, K and V coming and says what they are; one
// writes the rows that see nothing, which have no tiles.
#pragma once

#include "arch/sm90/tma.cuh"
#include "attention/box_tiles.cuh"
#include "sm90/fwd/traits.cuh"
#include "sm90/work.cuh"

namespace longgen::sm90 {

// Calls visit(work, boxes) for this block's work items, in order.
template <typename Traits, typename Visit>
__device__ __forceinline__ void for_each_item(const AttentionFwdParams& params, Visit visit) {
  for (int round = 0; round * gridDim.x < params.work_items; ++round) {
    const int index = work_index(round, params.work_items);
    if (index < 0) continue;
    Work work = work_item<Traits::kBlockM>(params, params.q_tiles, index);
    if (work.empty()) continue;
    if (params.block_table != nullptr)  // a length may not reach past the table
      work.k_len = min(work.k_len, params.table_pages << params.log2_page);
    const KeyBoxes boxes(params.pattern, params.log2_box, work.p_first(),
                         work.p_last(Traits::kBlockM), work.k_start, work.k_start + work.k_len,
                         work.head, params.q_heads, work.head / params.group);
    visit(work, boxes);
  }
}

// Where in K and V the row `row` of a sequence lies, as coordinates of the copy engine.
struct Place {
  int row, batch;
};
__device__ __forceinline__ Place key_place(const AttentionFwdParams& params, const Work& work,
                                           int row) {
  if (params.block_table == nullptr) return {row + work.k_row0, work.batch};
  if (row < 0 || row >= work.k_len) return {kNowhere, 0};
  const int page = row >> params.log2_page;
  return {row & ((1 << params.log2_page) - 1),
          __ldg(params.block_table + static_cast<int64_t>(work.index) * params.table_pages + page)};
}

template <typename Traits>
__device__ void produce(const AttentionFwdParams& params, const CUtensorMap& q_map,
                        const CUtensorMap& k_map, const CUtensorMap& v_map,
                        typename Traits::Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int boxes_per_tile = Traits::kBlockN >> params.log2_box;
  const int box_rows = 1 << params.log2_box;
  // Lane l copies panel l / boxes_per_tile of box l % boxes_per_tile.
  const int my_box = lane % boxes_per_tile;
  const int my_panel = lane / boxes_per_tile;
  const bool copies = lane < boxes_per_tile * Traits::kPanels;
  const int my_offset = my_panel * Traits::kPanelElements + my_box * box_rows * 64;

  Ring<Traits::kKeyStages> keys;
  Ring<Traits::kValueStages> values;
  uint32_t items = 0;  // whose Q was copied
  // A tile's V is copied after the K of the next one, as they are needed in this order.
  struct {
    Place place;
    int kv_head;
  } owed = {{0, 0}, -1};
  const auto copy_owed_values = [&] {
    if (owed.kv_head < 0) return;
    const int stage = values.stage;
    shared.v_empty[stage].wait(values.round ^ 1);
    if (lane == 0) shared.v_full[stage].arrive_and_expect(Traits::kTileBytes);
    if (copies)
      copy_box(v_map, shared.v_full[stage], shared.v[stage] + my_offset, my_panel * 64,
               owed.place.row, owed.kv_head, owed.place.batch);
    values.advance();
  };

  for_each_item<Traits>(params, [&](const Work& work, const KeyBoxes& boxes) {
    if (boxes.empty()) return;
    const int kv_head = work.head / params.group;
    const int q_stage = items % Traits::kQueryStages;
    shared.q_empty[q_stage].wait((items / Traits::kQueryStages & 1) ^ 1);
    if (lane == 0) {
      shared.item[q_stage] = {work.head,  work.batch,   work.q_row0,
                              work.q_len, work.q_start, work.p_tile};
      shared.q_full[q_stage].arrive_and_expect(Traits::kTileBytes);
    }
    if (lane < Traits::kPanels)
      copy_box(q_map, shared.q_full[q_stage], shared.q[q_stage] + lane * Traits::kPanelElements,
               lane * 64, work.q_row0 + work.p_tile - work.q_start, work.head, work.batch);
    ++items;

    BoxTiles tiles(boxes, boxes_per_tile);
    do {
      const Box box = tiles.next(my_box);
      const int row = box.position - work.k_start;
      const Place place = key_place(params, work, row);
      const bool masked = __any_sync(0xffffffff, box.masked);
      const bool foreign = params.cu_seqlens_k != nullptr &&
                           __any_sync(0xffffffff, row < 0 || row + box_rows > work.k_len);
      const int stage = keys.stage;
      shared.k_empty[stage].wait(keys.round ^ 1);
      // Of a tile without a mask nobody asks where its boxes stand, which may take a division.
      if (masked && lane < boxes_per_tile) shared.tile[stage].box[lane] = key_box(boxes, box);
      if (foreign && lane < boxes_per_tile)
        shared.tile[stage].own_rows[lane] = {max(-row, 0), min(work.k_len - row, box_rows)};
      if (lane == 0) {
        shared.tile[stage].flags = (masked ? TileInfo::kMasked : 0) |
                                   (tiles.done() ? TileInfo::kLast : 0) |
                                   (foreign ? TileInfo::kForeign : 0);
        shared.k_full[stage].arrive_and_expect(Traits::kTileBytes);
      } else {
        shared.k_full[stage].arrive();
      }
      if (copies)
        copy_box(k_map, shared.k_full[stage], shared.k[stage] + my_offset, my_panel * 64, place.row,
                 kv_head, place.batch);
      keys.advance();

      copy_owed_values();
      owed = {place, kv_head};
    } while (!tiles.done());
  });
  shared.k_empty[keys.stage].wait(keys.round ^ 1);
  if (lane == 0) shared.tile[keys.stage].flags = TileInfo::kEnd;
  shared.k_full[keys.stage].arrive();
  copy_owed_values();
}

// Output 0 and LSE -inf for the rows of items without keys.
template <typename Traits>
__device__ void write_rows_that_see_nothing(const AttentionFwdParams& params) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32;
  for_each_item<Traits>(params, [&](const Work& work, const KeyBoxes& boxes) {
    if (!boxes.empty()) return;
    const int64_t row_stride = static_cast<int64_t>(params.q_heads) * Traits::kHeadDim;
    for (int p = work.p_first(); p <= work.p_last(Traits::kBlockM); ++p) {
      const int row = work.q_row0 + p - work.q_start;
      T* out = static_cast<T*>(params.out) + work.head * Traits::kHeadDim +
               (static_cast<int64_t>(work.batch) * params.seqlen_q + row) * row_stride;
      for (int chunk = lane; chunk < Traits::kHeadDim / 8; chunk += 32)
        reinterpret_cast<uint4*>(out)[chunk] = uint4{0, 0, 0, 0};
      if (lane == 0)
        params
            .lse[(static_cast<int64_t>(work.batch) * params.q_heads + work.head) * params.seqlen_q +
                 row] = -INFINITY;
    }
  });
}

}  // namespace longgen::sm90
