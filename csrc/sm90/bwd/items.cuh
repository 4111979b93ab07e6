// What the persistent blocks of the backward kernel work through: key tiles, each with the query
// tiles that see it, over all query heads of its KV head.
#pragma once

#include "attention/key_tiles.cuh"
#include "attention/sequence.cuh"
#include "params.h"

namespace longgen::sm90 {

// Rows of a query tile: as many as make its dQ two parts of 64 x 64, one for each math warpgroup.
__host__ __device__ constexpr int query_rows(int head_dim) { return 2 * 64 * 64 / head_dim; }

struct Item {
  KeyTile keys;
  Sequence sequence;
  int kv_head;
  int slot;               // of the global or local tiles of the sequence and head
  int j_first;            // position of the tile's first key
  Run some, all;          // the queries that see some key of the tile, and that see every row
  int first_step, steps;  // of the (query head, query tile) pairs that see the tile
  int partial;            // where a chunk's sums go, or -1: into the gradients
  bool stop;              // no item: there are no more

  __host__ __device__ __forceinline__ int q_end() const {
    return sequence.q_start + sequence.q_len;
  }
  // Whether some pair of the key tile and `rows` queries from p_tile on is not visible.
  __host__ __device__ __forceinline__ bool masks(int p_tile, int rows) const {
    return p_tile < all.lo || p_tile + rows > all.hi;
  }
  // Which of a head's `count` query tiles comes in place `index`. Those of global keys come from
  // the last one down: the items of a head, which start at different positions, then pass the same
  // tiles at the same time, and Q, dO and dQ's sums of many heads at once need not fit into L2.
  __host__ __device__ __forceinline__ int place(int index, int count) const {
    return keys.global ? count - 1 - index : index;
  }
  // Rows in the tensors of the token at a position.
  __host__ __device__ __forceinline__ int k_row(int position) const {
    return sequence.k_row0 - sequence.k_start + position;
  }
  __host__ __device__ __forceinline__ int q_row(int position) const {
    return sequence.q_row0 - sequence.q_start + position;
  }
};

// The number, among all heads' query tiles, of tile 0 of a sequence and head.
template <int kQueryTile>
__host__ __device__ __forceinline__ int first_query_tile(const AttentionBwdParams& params,
                                                         const Sequence& sequence, int head) {
  const int slot =
      params.cu_seqlens_q == nullptr ? 0 : sequence.q_row0 / kQueryTile + 2 * sequence.index;
  return (sequence.batch * params.q_heads + head) * params.plan.q_tiles + slot;
}

template <int kQueryTile>
__host__ __device__ __forceinline__ QueryTiles<kQueryTile> query_tiles(
    const AttentionBwdParams& params, const Item& item, int head) {
  return QueryTiles<kQueryTile>(params.pattern, item.some, item.j_first, item.sequence.q_start,
                                head, params.q_heads);
}

// Steps lo to hi - 1.
struct Steps {
  int lo, hi;
};

// Where in an item the keys of a math warpgroup are seen: in no step outside, and {0, 0} if in
// none. Of an item that several query heads share, only the first one's beginning and the last
// one's end are left out.
template <int kQueryTile>
__host__ __device__ __forceinline__ Steps steps_of_warpgroup(const PatternParams& pattern,
                                                             const Item& item, int warpgroup) {
  const KeyTile keys = item.keys.part(warpgroup * 64, 64);
  if (keys.empty() || item.steps == 0) return {0, 0};
  if (pattern.mask_cols != nullptr) return {0, item.steps};  // its tiles are not a run
  const Run seen = seen_by_some(pattern, keys, item.sequence.q_start, item.q_end());
  if (seen.hi <= seen.lo) return {0, 0};
  // In a head's tiles, numbered from the item's first one: as `seen` is part of `some`, none lies
  // outside.
  const int tile0 = item.some.lo & -kQueryTile;
  const int count = (item.some.hi - tile0 + kQueryTile - 1) / kQueryTile;
  int first = (seen.lo - tile0) / kQueryTile;
  int last = (seen.hi - 1 - tile0) / kQueryTile;
  if (item.keys.global) {
    const int lowest = first;
    first = item.place(last, count);
    last = item.place(lowest, count);
  }
  const int begin = item.first_step % count;
  const int end = (item.first_step + item.steps - 1) % count;
  Steps steps{0, item.steps};
  if (begin < first) steps.lo = first - begin;
  if (end > last) steps.hi -= end - last;
  return steps.lo < steps.hi ? steps : Steps{0, 0};
}

// The key tile in slot `slot` of the global or local ones, with all its steps. Returns whether it
// exists.
template <int kQueryTile>
__host__ __device__ inline bool find_key_tile(const AttentionBwdParams& params, bool global,
                                              int slot, int kv_head, int batch, Item& item) {
  item.kv_head = kv_head;
  item.slot = slot;
  item.sequence = params.cu_seqlens_k == nullptr
                      ? dense_sequence(params, batch)
                      : packed_sequence<false>(params, kKeyTile, params.plan.key_slack, item.slot);
  forget_registers();
  const KeyTiles tiles(params.pattern, item.sequence.k_start,
                       item.sequence.k_start + item.sequence.k_len, kv_head);
  if (item.slot >= (global ? tiles.globals() : tiles.locals())) return false;
  item.keys = tiles[global ? item.slot : tiles.globals() + item.slot];
  forget_registers();
  item.j_first = item.keys.first_position(params.pattern);
  item.some = seen_by_some(params.pattern, item.keys, item.sequence.q_start, item.q_end());
  forget_registers();
  item.all = seen_by_all(params.pattern, item.keys);
  forget_registers();
  // Only a mask tells the query heads of a group apart.
  const bool alike = params.pattern.mask_cols == nullptr;
  item.steps = 0;
  for (int member = 0; member < (alike ? 1 : params.plan.group); ++member) {
    const int head = item.kv_head * params.plan.group + member;
    item.steps += query_tiles<kQueryTile>(params, item, head).count();
    forget_registers();
  }
  if (alike) item.steps *= params.plan.group;
  return true;
}

// Item `index`. Returns whether it exists.
template <int kQueryTile>
__host__ __device__ inline bool find_item(const AttentionBwdParams& params, int index, Item& item) {
  const BwdPlan& plan = params.plan;
  const bool global = index < plan.global_items;
  const int first_of_last = plan.items - plan.last_slots * plan.heads;
  const int slots = global ? plan.global_slots : plan.local_slots - plan.last_slots;
  int slot, rest;
  if (index < first_of_last) {
    rest = global ? index : index - plan.global_items;
    slot = rest % slots;
    rest /= slots;
  } else {
    rest = (index - first_of_last) % plan.heads;
    slot = slots + (index - first_of_last) / plan.heads;
  }
  item.first_step = 0;
  item.partial = -1;
  item.stop = false;
  if (global && plan.chunks > 1) {
    item.first_step = rest % plan.chunks * plan.chunk_steps;
    item.partial = index;
  }
  if (global) rest /= plan.chunks;
  if (!find_key_tile<kQueryTile>(params, global, slot, rest % params.kv_heads,
                                 rest / params.kv_heads, item))
    return false;
  if (item.partial < 0) return true;
  const int left = item.steps - item.first_step;
  item.steps = left < 0 ? 0 : left < plan.chunk_steps ? left : plan.chunk_steps;
  return left > 0 || item.first_step == 0;
}

}  // namespace longgen::sm90
