// The producer warp: keeps the tiles of Q, K and V coming.
#pragma once

#include "arch/sm90/tma.cuh"
#include "attention/key_boxes.cuh"
#include "sm90/work.cuh"

namespace longgen::sm90 {

template <typename Traits>
__device__ void produce(const AttentionFwdParams& params, const CUtensorMap& q_map,
                        const CUtensorMap& k_map, const CUtensorMap& v_map,
                        typename Traits::Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int boxes_per_tile = Traits::kBlockN >> params.log2_box;
  const int box_elements = 64 << params.log2_box;
  // Lane l copies panel l / boxes_per_tile of box l % boxes_per_tile.
  const int my_box = lane % boxes_per_tile;
  const int my_panel = lane / boxes_per_tile;
  const bool copies = lane < boxes_per_tile * Traits::kPanels;
  const int my_offset = my_panel * Traits::kPanelElements + my_box * box_elements;

  uint32_t step = 0;  // of the K and V pipelines
  uint32_t q_phase = 0;
  for (int round = 0; round * gridDim.x < params.work_items; ++round) {
    const int index = work_index(round, params.work_items);
    if (index < 0) continue;
    const Work work = work_item<Traits::kBlockM>(params, params.q_tiles, index);
    if (work.empty()) continue;
    const int kv_head = work.head / params.group;
    const KeyBoxes boxes(params.pattern, params.log2_box, work.p_first(),
                         work.p_last(Traits::kBlockM), work.k_start, work.k_start + work.k_len,
                         work.head, params.q_heads, kv_head);
    const int tiles = (boxes.count() + boxes_per_tile - 1) / boxes_per_tile;
    if (tiles == 0) continue;

    shared.q_empty.wait(q_phase ^ 1);
    if (lane == 0) shared.q_full.arrive_and_expect(Traits::kTileBytes);
    if (lane < Traits::kPanels)
      copy_box(q_map, shared.q_full, shared.q + lane * Traits::kPanelElements, lane * 64,
               work.q_row0 + work.p_tile - work.q_start, work.head, work.batch);
    q_phase ^= 1;

    // From the diagonal leftwards, as the math warpgroups go.
    for (int tile = tiles - 1; tile >= 0; --tile, ++step) {
      const int stage = step % Traits::kStages;
      const uint32_t free = (step / Traits::kStages & 1) ^ 1;
      const int row = boxes[tile * boxes_per_tile + my_box].position - work.k_start + work.k_row0;
      shared.k_empty[stage].wait(free);
      if (lane == 0) shared.k_full[stage].arrive_and_expect(Traits::kTileBytes);
      if (copies)
        copy_box(k_map, shared.k_full[stage], shared.k[stage] + my_offset, my_panel * 64, row,
                 kv_head, work.batch);
      shared.v_empty[stage].wait(free);
      if (lane == 0) shared.v_full[stage].arrive_and_expect(Traits::kTileBytes);
      if (copies)
        copy_box(v_map, shared.v_full[stage], shared.v[stage] + my_offset, my_panel * 64, row,
                 kv_head, work.batch);
    }
  }
}

}  // namespace longgen::sm90
