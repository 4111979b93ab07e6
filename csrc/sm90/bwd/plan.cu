// Counts the backward kernel's items, and decides into how many chunks the longest are divided.
#include <algorithm>

#include "sm90/bwd/items.cuh"
#include "sm90/bwd/plan.h"
#include "sm90/bwd/statistics.cuh"

namespace longgen::sm90 {
namespace {

// Steps of a chunk that its own start, end and sums in memory are small against.
constexpr int kShortestChunk = 16;

// At most so many local tiles are left for the end: more even nothing out, and Q, dO and dQ's sums
// of many heads at once have to fit into L2.
constexpr int kLastItems = 256;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The steps of all items of a dense batch, from a few of each class of head 0.
template <int kQueryTile>
int64_t estimated_steps(const AttentionBwdParams& params) {
  int64_t total = 0;
  for (const bool global : {true, false}) {
    const int slots = global ? params.plan.global_slots : params.plan.local_slots;
    const int samples = std::min(slots, 16);
    int64_t steps = 0;
    for (int i = 0; i < samples; ++i) {
      Item item;
      const int slot = static_cast<int>((2 * i + 1) * static_cast<int64_t>(slots) / (2 * samples));
      if (find_key_tile<kQueryTile>(params, global, slot, 0, 0, item)) steps += item.steps;
    }
    if (samples > 0) total += steps * slots / samples;
  }
  return total * params.batch * params.kv_heads;
}

template <int kQueryTile>
BwdPlan plan_tiles(AttentionBwdParams params) {
  const PatternParams& pattern = params.pattern;
  const bool packed = params.cu_seqlens_q != nullptr;
  BwdPlan& plan = params.plan;
  plan = BwdPlan{};
  plan.group = params.q_heads / params.kv_heads;
  plan.chunks = 1;
  const int batch = packed ? 1 : params.batch;
  if (packed) {
    plan.q_tiles = params.seqlen_q / kQueryTile + 2 * (params.batch + 1);
    // Each class of keys has ragged tiles at both ends.
    const bool global = pattern.sink > 0 || pattern.stride > 0;
    plan.key_slack = 2 * (1 + (pattern.sink > 0) + (pattern.stride > 0));
    plan.local_slots = params.seqlen_k / kKeyTile + plan.key_slack * (params.batch + 1);
    plan.global_slots = global ? plan.local_slots : 0;
  } else {
    // Tiles are aligned to positions.
    plan.q_tiles = ceil_div(params.seqlen_q + (params.q_start & (kQueryTile - 1)), kQueryTile);
    for (int head = 0; head < params.kv_heads; ++head) {
      const KeyTiles tiles(pattern, params.k_start, params.k_start + params.seqlen_k, head);
      plan.global_slots = std::max(plan.global_slots, tiles.globals());
      plan.local_slots = std::max(plan.local_slots, tiles.locals());
    }
    // A tile that takes more than half of a multiprocessor's share of the work is divided. Masks
    // have no global tiles, and their lists are on the device.
    if (plan.global_slots > 0 && plan.q_tiles > 0) {
      const int64_t longest = static_cast<int64_t>(plan.group) * plan.q_tiles;
      const int64_t share = estimated_steps<kQueryTile>(params) / params.multiprocessors;
      plan.chunk_steps =
          static_cast<int>(std::min(longest, std::max<int64_t>(share / 2, kShortestChunk)));
      plan.chunks = static_cast<int>((longest + plan.chunk_steps - 1) / plan.chunk_steps);
    }
  }
  constexpr int kRows = 128;
  plan.row_tiles = packed ? params.seqlen_q / kRows + 2 * (params.batch + 1)
                          : ceil_div(params.seqlen_q + (params.q_start & (kRows - 1)), kRows);
  plan.row_items = plan.row_tiles * params.q_heads * batch;
  plan.log2_box = 6;
  const bool has_blocks = pattern.stride != 0 || pattern.mask_cols != nullptr;
  if (has_blocks) plan.log2_box = std::min(plan.log2_box, pattern.log2_block);

  plan.global_items = plan.global_slots * plan.chunks * params.kv_heads * batch;
  plan.heads = params.kv_heads * batch;
  plan.last_slots = std::min(plan.local_slots, kLastItems / std::max(plan.heads, 1));
  plan.items = plan.global_items + plan.local_slots * plan.heads;
  return plan;
}

}  // namespace

BwdPlan make_plan(const AttentionBwdParams& params) {
  return params.head_dim == 64 ? plan_tiles<query_rows(64)>(params)
                               : plan_tiles<query_rows(128)>(params);
}

BwdWorkspace workspace(const AttentionBwdParams& params, const BwdPlan& plan) {
  const int64_t batch = params.cu_seqlens_q != nullptr ? 1 : params.batch;
  const int rows = query_rows(params.head_dim);
  const int64_t tiles = batch * params.q_heads * plan.q_tiles;
  return {tiles * 2 * statistics_floats(rows),
          params.deterministic ? 0 : tiles * rows * params.head_dim,
          plan.chunks == 1
              ? 0
              : static_cast<int64_t>(plan.global_items) * 2 * kKeyTile * params.head_dim};
}

}  // namespace longgen::sm90
