// The Hopper backward kernel's enumeration of work for the CPU; for test_backward_enumeration.py.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "host_pattern.cuh"
#include "sm90/bwd/plan.cu"

using namespace longgen;
using namespace longgen::sm90;

namespace {

// Whether the passes over rows give tile `tile` of a head and sequence the same number.
template <int kQueryTile>
bool numbered_alike(const AttentionBwdParams& params, const Item& item, int head, int tile) {
  int slot = first_query_tile<kQueryTile>(params, item.sequence, head) + tile -
             (item.sequence.batch * params.q_heads + head) * params.plan.q_tiles;
  if (slot < 0 || slot >= params.plan.q_tiles) return false;
  if (params.cu_seqlens_q == nullptr) return slot == tile;
  const Sequence sequence = packed_sequence<true>(params, kQueryTile, 2, slot);
  return sequence.index == item.sequence.index && slot == tile;
}

template <int kQueryTile>
int walk(const AttentionBwdParams& params, int32_t* owned, int8_t* seen) {
  for (int index = 0; index < params.plan.items; ++index) {
    Item item{};
    if (!find_item<kQueryTile>(params, index, item)) continue;
    const int batch = item.sequence.batch;
    std::vector<int> k_rows(kKeyTile, -1);
    std::vector<Run> runs(kKeyTile, {kBeyond, 0});
    for (int row = 0; row < kKeyTile; ++row) {
      if (!item.keys.owns(row)) continue;
      const int position = item.keys.position(params.pattern, item.keys.column0 + row);
      k_rows[row] = item.k_row(position);
      runs[row] = item.keys.seen(params.pattern, position);
      if (k_rows[row] < 0 || k_rows[row] >= params.seqlen_k) return 1;  // no such key
      if (item.first_step == 0)
        ++owned[(batch * params.kv_heads + item.kv_head) * params.seqlen_k + k_rows[row]];
    }
    const int box = 1 << params.plan.log2_box;
    for (int row = 0; row < kKeyTile && item.keys.whole(); ++row)
      if (row % box != 0 && k_rows[row] != k_rows[row - 1] + 1) return 5;  // no run of keys
    const Steps own[] = {steps_of_warpgroup<kQueryTile>(params.pattern, item, 0),
                         steps_of_warpgroup<kQueryTile>(params.pattern, item, 1)};
    for (const Steps& steps : own)
      if (steps.lo < 0 || steps.hi > item.steps || steps.hi < steps.lo) return 6;
    // Otherwise steps of no use may lie between others.
    const bool exact = params.plan.group == 1 && item.partial < 0 && params.pattern.stride == 0 &&
                       params.pattern.mask_cols == nullptr &&
                       (params.pattern.window_kind == Window::kNone || params.pattern.window > 0);
    int step = 0;
    int head = item.kv_head * params.plan.group, skipped = item.first_step, left = item.steps;
    for (; left > 0; ++head) {
      if (head == (item.kv_head + 1) * params.plan.group) return 2;  // fewer steps than promised
      const auto tiles = query_tiles<kQueryTile>(params, item, head);
      const int first = std::min(skipped, tiles.count());
      const int last = std::min(tiles.count(), skipped + left);
      skipped -= first;
      left -= last - first;
      for (int i = first; i < last; ++i, ++step) {
        const int tile = tiles.at(params.pattern, item.place(i, tiles.count()));
        if (!numbered_alike<kQueryTile>(params, item, head, tile)) return 3;
        const int p_tile = (item.sequence.q_start & -kQueryTile) + tile * kQueryTile;
        const bool masked = item.masks(p_tile, kQueryTile);
        bool in_vain[] = {true, true};
        for (int p = p_tile; p < p_tile + kQueryTile; ++p) {
          for (int row = 0; row < kKeyTile; ++row) {
            const bool shown = p >= runs[row].lo && p < runs[row].hi;
            if (!masked && !shown) return 4;  // would show a pair that is not visible
            if (!shown || p < item.sequence.q_start || p >= item.q_end()) continue;
            const Steps& steps = own[row / 64];
            if (step < steps.lo || step >= steps.hi) return 7;  // would not be computed
            in_vain[row / 64] = false;
            const int64_t q_row =
                static_cast<int64_t>(batch * params.q_heads + head) * params.seqlen_q +
                item.q_row(p);
            ++seen[q_row * params.seqlen_k + k_rows[row]];
          }
        }
        for (int w = 0; w < 2; ++w)
          if (exact && in_vain[w] && step >= own[w].lo && step < own[w].hi) return 8;
      }
    }
  }
  return 0;
}

}  // namespace

// Lists the items of one head of a causal sequence: a row of `width` numbers for each, the position
// of its first key, whether it is global, its number of query tiles, and these in the order in
// which they pass. Returns how many items there are.
extern "C" int list_items(const int32_t* code, int tokens, int multiprocessors, int width,
                          int32_t* rows) {
  AttentionBwdParams params{};
  params.pattern = decode(code, nullptr, nullptr);
  params.batch = params.q_heads = params.kv_heads = 1;
  params.seqlen_q = params.seqlen_k = tokens;
  params.head_dim = 128;
  params.multiprocessors = multiprocessors;
  params.plan = make_plan(params);
  constexpr int kQueryTile = query_rows(128);
  int found = 0;
  for (int index = 0; index < params.plan.items; ++index) {
    Item item{};
    if (!find_item<kQueryTile>(params, index, item)) continue;
    int32_t* row = rows + found++ * width;
    *row++ = item.j_first;
    *row++ = item.keys.global;
    *row++ = item.steps;
    const auto tiles = query_tiles<kQueryTile>(params, item, 0);
    for (int i = item.first_step; i < item.first_step + item.steps; ++i)
      *row++ = tiles.at(params.pattern, item.place(i, tiles.count()));
  }
  return found;
}

// Adds to owned[b, kv head, key row] how many key tiles hold the row, and to seen[b, head, query
// row, key row] how often the pair is visited and shown. `sizes` are AttentionBwdParams' own, in
// order, then the positions of the first rows and the number of multiprocessors. Returns the number
// of chunks that global tiles are divided into, or what is wrong, negative.
extern "C" int enumerate(const int32_t* code, const int32_t* mask_cols, const int32_t* sizes,
                         const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                         const int32_t* q_starts, const int32_t* k_starts, int32_t* owned,
                         int8_t* seen) {
  AttentionBwdParams params{};
  params.pattern = decode(code, nullptr, mask_cols);
  params.batch = sizes[0];
  params.seqlen_q = sizes[1];
  params.seqlen_k = sizes[2];
  params.q_heads = sizes[3];
  params.kv_heads = sizes[4];
  params.head_dim = sizes[5];
  params.q_start = sizes[6];
  params.k_start = sizes[7];
  params.multiprocessors = sizes[8];
  params.cu_seqlens_q = cu_seqlens_q;
  params.cu_seqlens_k = cu_seqlens_k;
  params.q_starts = q_starts;
  params.k_starts = k_starts;
  params.plan = make_plan(params);
  const int wrong = params.head_dim == 64 ? walk<query_rows(64)>(params, owned, seen)
                                          : walk<query_rows(128)>(params, owned, seen);
  return wrong != 0 ? -wrong : params.plan.chunks;
}
