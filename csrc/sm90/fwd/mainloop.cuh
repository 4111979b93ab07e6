// A math warpgroup: scores, online softmax and output of 64 query rows.
//
// The next block's Q K^T is issued before this block's P V, so that the tensor cores have work
// while softmax runs; and the two warpgroups take turns at issuing, so that one's softmax meets the
// other's matrix products.
#pragma once

#include "arch/sm90/barrier.cuh"
#include "arch/sm90/wgmma.cuh"
#include "attention/key_mask.cuh"
#include "attention/softmax.cuh"
#include "params.h"
#include "sm90/fwd/epilogue.cuh"
#include "sm90/fwd/traits.cuh"

namespace longgen::sm90 {

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;      // + warpgroup: its turn to issue
constexpr int kEpilogueBarrier = 3;  // + warpgroup: its rows are staged

template <typename Traits>
class MathWarpgroup {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kBlockN / 2;  // accumulators a thread
  static constexpr int kOutputs = Traits::kHeadDim / 2;
  // So many scores become weights beside P V of the tile before, which takes that long; the others'
  // exponentials meet the conversion of these weights into an operand.
  static constexpr int kWeighedBeside = Traits::kHeadDim == 64 ? kScores / 2 + 8 : kScores;

 public:
  __device__ MathWarpgroup(const AttentionFwdParams& params, typename Traits::Shared& shared,
                           int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % 32),
        boxes_per_tile_(Traits::kBlockN >> params.log2_box) {
    const int thread = threadIdx.x % 128;
    row_ = warpgroup * 64 + thread / 32 * 16 + lane_ / 4;
    q_address_ = shared_address(shared.q) + warpgroup * 64 * 128;
    if (warpgroup == Traits::kMathWarpgroups - 1) named_barrier_arrive(kTurnBarrier, 256);
  }

  // One loop over the key tiles of all items: an item's first scores are issued with the last P V
  // of the item before, so that the tensor cores do not idle between items.
  __device__ __forceinline__ void run() {
    Tile tile{keys_.stage, await_keys(), 0};
    if (tile.flags & TileInfo::kEnd) return;
    tile.q_stage = await_item();
    OnlineSoftmax softmax;
    float s[kScores], o[kOutputs], rescale[2];
    float tile_sum[2] = {0.f, 0.f};  // of the weights in p, until they are known to be good
    uint32_t p[kScores / 2];
    issue_scores(s, tile);
    wgmma_wait<0>();
    pin(s);
    if (tile.flags & TileInfo::kMasked) hide_others(s, visible(tile));
    softmax.refer(s, params_.scale_log2, rescale);
    softmax.weigh(s, params_.scale_log2, tile_sum);
    to_operand(p, s);

    Tile next = await_tile_after(tile);
    bool fresh = true;  // o holds nothing of this item yet
    for (int slot = 0;; slot ^= 1) {
      const bool end = next.flags & TileInfo::kEnd;  // then its scores are of nothing
      const bool ends = tile.flags & TileInfo::kLast;
      named_barrier_sync(kTurnBarrier + warpgroup_, 256);
      issue_scores(s, next);
      shared_.v_full[values_.stage].wait(values_.round);
      if (redo_asked(slot)) {
        wgmma_wait<0>();
        pin(s);
        issue_scores(s, tile);
        wgmma_wait<0>();
        pin(s);
        if (tile.flags & TileInfo::kMasked) hide_others(s, visible(tile));
        softmax.refer(s, params_.scale_log2, rescale);
        softmax.weigh(s, params_.scale_log2, tile_sum);
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
        to_operand(p, s);
        redo_done(slot);
        issue_scores(s, next);
      }
      softmax.add(tile_sum);
      if (tile.flags & TileInfo::kForeign) clear_foreign(shared_.tile[tile.k_stage], values_.stage);
      shared_.k_empty[tile.k_stage].arrive();
      issue_output(o, p, !fresh);
      named_barrier_arrive(kTurnBarrier + (1 - warpgroup_), 256);
      VisibleKeys<kScores> seen;  // beside the products
      if (next.flags & TileInfo::kMasked) seen = visible(next);
      Tile later = next;
      if (Traits::kAskEarly && !end) later = await_tile_after(next);
      wgmma_wait<1>();
      pin(s);
      if (end) {
        wgmma_wait<0>();
        pin(o);
        finish(tile.q_stage, softmax, o);
        return;
      }
      if (next.flags & TileInfo::kMasked) hide_others(s, seen);
      OnlineSoftmax following = softmax;
      if (ends) {
        following = OnlineSoftmax{};
        following.refer(s, params_.scale_log2, rescale);
      }
      OnlineSoftmax::PartialSums sums;
      following.weigh<0, kWeighedBeside>(s, params_.scale_log2, sums);
      OnlineSoftmax::total(sums, tile_sum);
      ask_for_redo(slot ^ 1, !OnlineSoftmax::fits(tile_sum));
      wgmma_wait<0>();
      pin(o);
      release(shared_.v_empty[values_.stage]);
      if (ends) {
        finish(tile.q_stage, softmax, o);
        shared_.q_empty[tile.q_stage].arrive();
      }
      if constexpr (kWeighedBeside < kScores) {
        following.weigh<kWeighedBeside, kScores>(s, params_.scale_log2, sums);
        OnlineSoftmax::total(sums, tile_sum);
        ask_for_redo(slot ^ 1, !OnlineSoftmax::fits(tile_sum));
      }
      to_operand(p, s);
      values_.advance();
      softmax = following;
      if (!Traits::kAskEarly) later = await_tile_after(next);
      tile = next;
      next = later;
      fresh = ends;
    }
  }

 private:
  __device__ __forceinline__ int await_keys() {
    shared_.k_full[keys_.stage].wait(keys_.round);
    // Known to the compiler as uniform: descriptors then are arithmetic in uniform registers.
    return __shfl_sync(0xffffffff, shared_.tile[keys_.stage].flags, 0);
  }

  __device__ __forceinline__ int await_item() {
    const int q_stage = items_ % Traits::kQueryStages;
    shared_.q_full[q_stage].wait(items_ / Traits::kQueryStages & 1);
    ++items_;
    return q_stage;
  }

  // A tile whose K and Q are there.
  struct Tile {
    int k_stage, flags, q_stage;
  };

  __device__ __forceinline__ Tile await_tile_after(const Tile& tile) {
    keys_.advance();
    Tile next{keys_.stage, await_keys(), tile.q_stage};
    const bool starts = (tile.flags & TileInfo::kLast) && !(next.flags & TileInfo::kEnd);
    if (starts) next.q_stage = await_item();
    return next;
  }

  // A warp whose weights got out of bounds tells the others, as a matrix product takes all four.
  // They look after their next turn barrier; by then the first of them may be at the tile after,
  // therefore two slots. This is also what keeps the assembler, which moves nothing across a store
  // to shared memory, from waiting for P V before softmax instead of after.
  __device__ __forceinline__ void ask_for_redo(int slot, bool mine) {
    if (__any_sync(0xffffffff, mine)) shared_.redo[warpgroup_][slot] = 1;
  }
  __device__ __forceinline__ bool redo_asked(int slot) const {
    return __shfl_sync(0xffffffff, *const_cast<volatile int*>(&shared_.redo[warpgroup_][slot]), 0);
  }
  __device__ __forceinline__ void redo_done(int slot) {
    named_barrier_sync(kEpilogueBarrier + warpgroup_, 128);  // all have looked
    if (threadIdx.x % 128 == 0) shared_.redo[warpgroup_][slot] = 0;
  }

  // One arrival a warp, when all its lanes have read what they need: a warp's own wgmma_wait says
  // nothing about its neighbours.
  __device__ __forceinline__ void release(Mbarrier& empty) {
    __syncwarp();
    if (lane_ == 0) empty.arrive();
  }

  // S = Q K^T of this warpgroup's rows.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores], const Tile& tile) {
    const uint64_t q = operand(q_address_ + tile.q_stage * Traits::kTileBytes);
    const uint64_t keys = operand(shared_address(shared_.k[tile.k_stage]));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const uint32_t offset = k / 4 * Traits::kPanelBytes + k % 4 * 32;
      Wgmma<Traits::kBlockN, T>::template ss<false, false>(s, advance(q, offset),
                                                           advance(keys, offset), k > 0);
    }
    wgmma_commit();
  }

  // O += P V; V is N-major: 16 keys are two groups of 8 rows of 128 bytes.
  __device__ __forceinline__ void issue_output(float (&o)[kOutputs],
                                               const uint32_t (&p)[kScores / 2], bool accumulate) {
    const uint64_t values = operand(shared_address(shared_.v[values_.stage]), Traits::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kBlockN / 16; ++k) {
      const uint32_t a[4] = {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]};
      Wgmma<Traits::kHeadDim, T>::template rs<true>(o, a, advance(values, k * 2048),
                                                    accumulate || k > 0);
    }
    wgmma_commit();
  }

  // In a packed batch a tile may reach into the next sequence, or into rows of none. Their weights
  // are 0, but 0 times NaN is NaN: their values become 0. Both warpgroups write the same zeros.
  __device__ __forceinline__ void clear_foreign(const TileInfo& tile, int v_stage) {
    const int box_rows = 1 << params_.log2_box;
    const int thread = threadIdx.x % 128;
    for (int b = 0; b < boxes_per_tile_; ++b) {
      const int lo = tile.own_rows[b].lo, hi = tile.own_rows[b].hi;
      if (lo <= 0 && hi >= box_rows) continue;
      for (int chunk = thread; chunk < box_rows * Traits::kPanels * 8; chunk += 128) {
        const int row = chunk / 8 % box_rows;
        if (row >= lo && row < hi) continue;
        T* panel = shared_.v[v_stage] + chunk / (8 * box_rows) * Traits::kPanelElements;
        // The swizzle permutes 16-byte chunks within a row only.
        reinterpret_cast<uint4*>(panel + (b * box_rows + row) * 64)[chunk % 8] = uint4{0, 0, 0, 0};
      }
    }
    fence_async_proxy();
    named_barrier_sync(kEpilogueBarrier + warpgroup_, 128);
  }

  __device__ __forceinline__ void to_operand(uint32_t (&p)[kScores / 2],
                                             const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // What this thread's rows see of a tile.
  __device__ __forceinline__ VisibleKeys<kScores> visible(const Tile& tile) const {
    const TileInfo& info = shared_.tile[tile.k_stage];
    return visible_keys<kScores>(
        params_.pattern, [&](int b) -> const KeyBox& { return info.box[b]; }, params_.log2_box,
        shared_.item[tile.q_stage].p_tile + row_, warpgroup_);
  }

  // Normalises, stages the rows in shared memory and writes them 16 bytes a thread.
  __device__ __forceinline__ void finish(int q_stage, OnlineSoftmax& softmax,
                                         float (&o)[kOutputs]) {
    const ItemInfo work = shared_.item[q_stage];
    if constexpr (Traits::kOutputRoom) {
      const int warp_row = threadIdx.x / 32 % 4 * 16 + warpgroup_ * 64;
      write_rows<Traits>(params_, work, shared_.out + warp_row * Traits::kHeadDim, warp_row,
                         softmax, o);
      return;
    }
    // Opaque to the compiler, which would otherwise compute every address of this function before
    // the main loop and keep them all.
    int first_row = row_, thread = threadIdx.x % 128;
    asm volatile("" : "+r"(first_row), "+r"(thread));
    constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes in a row
    // Staged where this warpgroup's rows of Q were.
    const auto staged = [&](int row, int chunk) {
      return reinterpret_cast<uint4*>(shared_.q[q_stage] + chunk / 8 * Traits::kPanelElements +
                                      row * 64) +
             (chunk % 8 ^ row % 8);  // so that the rows of a warp fall into different banks
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax.sum[half]);
      const bool seen = sum != 0.f;  // NaN is not 0: it stays NaN
      const float scale = seen ? 1.f / sum : 0.f;
      const int row = first_row + 8 * half;
      const int q_row = work.p_tile + row - work.q_start;
      if (lane_ % 4 == 0 && q_row >= 0 && q_row < work.q_len) {
        const float lse = softmax.reference[half] + log2f(sum);
        params_.lse[(static_cast<int64_t>(work.batch) * params_.q_heads + work.head) *
                        params_.seqlen_q +
                    work.q_row0 + q_row] = seen ? lse * 0.6931471805599453f : -INFINITY;
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int i = 4 * chunk + 2 * half;
        const uint32_t pair = seen ? pack<T>(o[i] * scale, o[i + 1] * scale) : 0u;
        reinterpret_cast<uint32_t*>(staged(row, chunk))[lane_ % 4] = pair;
      }
    }
    named_barrier_sync(kEpilogueBarrier + warpgroup_, 128);
    const int64_t row_stride = static_cast<int64_t>(params_.q_heads) * Traits::kHeadDim;
    T* out = static_cast<T*>(params_.out) + work.head * Traits::kHeadDim +
             (static_cast<int64_t>(work.batch) * params_.seqlen_q + work.q_row0) * row_stride;
#pragma unroll
    for (int i = 0; i < 64 * kChunks / 128; ++i) {
      const int row = warpgroup_ * 64 + (i * 128 + thread) / kChunks;
      const int chunk = (i * 128 + thread) % kChunks;
      const int q_row = work.p_tile + row - work.q_start;
      const uint4 value = *staged(row, chunk);
      if (q_row >= 0 && q_row < work.q_len)
        *reinterpret_cast<uint4*>(out + q_row * row_stride + chunk * 8) = value;
    }
    fence_async_proxy();  // the copy engine writes there next
  }

  const AttentionFwdParams& params_;
  typename Traits::Shared& shared_;
  const int warpgroup_;
  const int lane_;
  const int boxes_per_tile_;
  int row_;  // first of this thread's two rows in the tile
  uint32_t q_address_;
  Ring<Traits::kKeyStages> keys_;
  Ring<Traits::kValueStages> values_;
  uint32_t items_ = 0;  // with keys, so far
};

}  // namespace longgen::sm90
