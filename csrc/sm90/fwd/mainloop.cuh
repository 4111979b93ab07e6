// A math warpgroup: scores, online softmax and output of 64 query rows.
//
// The next block's Q K^T is issued before this block's P V, so that the tensor cores have work
// while softmax runs; and the two warpgroups take turns at issuing, so that one's softmax meets the
// other's matrix products.
#pragma once

#include "arch/sm90/barrier.cuh"
#include "arch/sm90/wgmma.cuh"
#include "attention/key_boxes.cuh"
#include "attention/key_mask.cuh"
#include "attention/softmax.cuh"
#include "sm90/work.cuh"

namespace longgen::sm90 {

// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;      // + warpgroup: its turn to issue
constexpr int kEpilogueBarrier = 3;  // + warpgroup: its rows are staged

template <typename Traits>
class MathWarpgroup {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kBlockN / 2;  // accumulators a thread
  static constexpr int kOutputs = Traits::kHeadDim / 2;

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
    anchor_address_ = shared_address(shared.anchors + warpgroup * 128 + thread);
    q_address_ = shared_address(shared.q) + warpgroup * 64 * 128;
    if (warpgroup == Traits::kMathWarpgroups - 1) named_barrier_arrive(kTurnBarrier, 256);
  }

  __device__ __forceinline__ void run() {
    for (int round = 0; round * gridDim.x < params_.work_items; ++round) {
      const int index = work_index(round, params_.work_items);
      if (index < 0) continue;
      const Work work = work_item<Traits::kBlockM>(params_, params_.q_tiles, index);
      if (!work.empty()) attend(work);
    }
  }

 private:
  __device__ __forceinline__ void attend(const Work& work) {
    const KeyBoxes boxes(params_.pattern, params_.log2_box, work.p_first(),
                         work.p_last(Traits::kBlockM), work.k_start, work.k_start + work.k_len,
                         work.head, params_.q_heads, work.head / params_.group);
    const int tiles = (boxes.count() + boxes_per_tile_ - 1) / boxes_per_tile_;

    OnlineSoftmax softmax;
    float o[kOutputs];
    if (tiles > 0) {
      float s[kScores];
      uint32_t p[kScores / 2];
      float rescale[2];
      shared_.q_full.wait(q_phase_);
      q_phase_ ^= 1;

      shared_.k_full[stage()].wait(phase());
      issue_scores(s, stage());
      wgmma_wait<0>();
      pin(s);
      release(shared_.k_empty[stage()]);
      if (needs_mask(boxes, (tiles - 1) * boxes_per_tile_))
        mask(s, boxes, (tiles - 1) * boxes_per_tile_, work);
      softmax.update(s, params_.scale_log2, rescale);
      to_operand(p, s);

      bool first = true;
      for (int tile = tiles - 2; tile >= 0; --tile) {
        const int v_stage = stage();
        const uint32_t v_phase = phase();
        ++step_;
        shared_.k_full[stage()].wait(phase());
        named_barrier_sync(kTurnBarrier + warpgroup_, 256);
        issue_scores(s, stage());
        shared_.v_full[v_stage].wait(v_phase);
        if (params_.cu_seqlens_k != nullptr)
          clear_neighbours(boxes, (tile + 1) * boxes_per_tile_, v_stage, work);
        issue_output(o, p, v_stage, !first);
        named_barrier_arrive(kTurnBarrier + (1 - warpgroup_), 256);
        first = false;
        const bool masked = needs_mask(boxes, tile * boxes_per_tile_);
        wgmma_wait<1>();
        pin(s);
        release(shared_.k_empty[stage()]);
        if (masked) mask(s, boxes, tile * boxes_per_tile_, work);
        const bool grown = softmax.update(s, params_.scale_log2, rescale);
        anchor(softmax);
        wgmma_wait<0>();
        pin(o);
        release(shared_.v_empty[v_stage]);
        to_operand(p, s);
        if (grown) {
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
        }
      }
      release(shared_.q_empty);
      shared_.v_full[stage()].wait(phase());
      if (params_.cu_seqlens_k != nullptr) clear_neighbours(boxes, 0, stage(), work);
      issue_output(o, p, stage(), !first);
      wgmma_wait<0>();
      pin(o);
      release(shared_.v_empty[stage()]);
      ++step_;
    } else {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] = 0.f;
    }
    finish(work, softmax, o);
  }

  __device__ __forceinline__ int stage() const { return step_ % Traits::kStages; }
  __device__ __forceinline__ uint32_t phase() const { return step_ / Traits::kStages & 1; }

  // Softmax is to run beside P V. The assembler sees no reason against waiting for P V first,
  // except the order of memory accesses: so the end of softmax becomes one.
  __device__ __forceinline__ void anchor(const OnlineSoftmax& softmax) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(anchor_address_),
                 "f"(softmax.sum[0] + softmax.sum[1])
                 : "memory");
  }

  // One arrival a warp: a warp's own wgmma_wait says nothing about its neighbours.
  __device__ __forceinline__ void release(Mbarrier& empty) {
    if (lane_ == 0) empty.arrive();
  }

  // S = Q K^T of this warpgroup's rows.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores], int k_stage) {
    const uint64_t q = operand(q_address_);
    const uint64_t keys = operand(shared_address(shared_.k[k_stage]));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const uint32_t offset = k / 4 * Traits::kPanelBytes + k % 4 * 32;
      Wgmma<Traits::kBlockN, T>::template ss<false>(s, advance(q, offset), advance(keys, offset),
                                                    k > 0);
    }
    wgmma_commit();
  }

  // O += P V; V is N-major: 16 keys are two groups of 8 rows of 128 bytes.
  __device__ __forceinline__ void issue_output(float (&o)[kOutputs],
                                               const uint32_t (&p)[kScores / 2], int v_stage,
                                               bool accumulate) {
    const uint64_t values = operand(shared_address(shared_.v[v_stage]), Traits::kPanelBytes);
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
  __device__ __forceinline__ void clear_neighbours(const KeyBoxes& boxes, int first_box,
                                                   int v_stage, const Work& work) {
    bool wrote = false;
    const int thread = threadIdx.x % 128;
    for (int b = 0; b < boxes_per_tile_; ++b) {
      const int box_rows = 1 << params_.log2_box;
      const int row0 = boxes[first_box + b].position - work.k_start;  // in the sequence
      if (row0 >= 0 && row0 + box_rows <= work.k_len) continue;
      wrote = true;
      for (int chunk = thread; chunk < box_rows * Traits::kPanels * 8;
           chunk += 128) {  // of 16 bytes
        const int row = chunk / 8 % box_rows;
        if (row0 + row >= 0 && row0 + row < work.k_len) continue;
        T* panel = shared_.v[v_stage] + chunk / (8 * box_rows) * Traits::kPanelElements;
        // The swizzle permutes chunks within a row only.
        reinterpret_cast<uint4*>(panel + (b * box_rows + row) * 64)[chunk % 8] = uint4{0, 0, 0, 0};
      }
    }
    if (!wrote) return;
    fence_async_proxy();
    named_barrier_sync(kEpilogueBarrier + warpgroup_, 128);
  }

  __device__ __forceinline__ void to_operand(uint32_t (&p)[kScores / 2],
                                             const float (&s)[kScores]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ bool needs_mask(const KeyBoxes& boxes, int first_box) const {
    return some_masked(boxes, first_box, boxes_per_tile_);
  }

  __device__ __forceinline__ void mask(float (&s)[kScores], const KeyBoxes& boxes, int first_box,
                                       const Work& work) {
    hide_keys(s, params_.pattern, boxes, first_box, params_.log2_box, work.p_tile + row_);
  }

  // Normalises, stages the rows in shared memory and writes them 16 bytes a thread.
  __device__ __forceinline__ void finish(const Work& work, OnlineSoftmax& softmax,
                                         float (&o)[kOutputs]) {
    constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes in a row
    uint32_t* staged = reinterpret_cast<uint32_t*>(shared_.out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax.sum[half]);
      const bool seen = sum != 0.f;  // NaN is not 0: it stays NaN
      const float scale = seen ? 1.f / sum : 0.f;
      const int row = row_ + 8 * half;
      const int q_row = work.p_tile + row - work.q_start;
      if (lane_ % 4 == 0 && q_row >= 0 && q_row < work.q_len) {
        const float lse = softmax.maximum[half] * params_.scale_log2 + log2f(sum);
        params_.lse[(static_cast<int64_t>(work.batch) * params_.q_heads + work.head) *
                        params_.seqlen_q +
                    work.q_row0 + q_row] = seen ? lse * 0.6931471805599453f : -INFINITY;
      }
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int i = 4 * chunk + 2 * half;
        const uint32_t pair = seen ? pack<T>(o[i] * scale, o[i + 1] * scale) : 0u;
        // Rotated by row, so that the rows of a warp fall into different banks.
        staged[(row * kChunks + (chunk ^ (row % 8))) * 4 + lane_ % 4] = pair;
      }
    }
    named_barrier_sync(kEpilogueBarrier + warpgroup_, 128);
    const int thread = threadIdx.x % 128;
    const int64_t row_stride = static_cast<int64_t>(params_.q_heads) * Traits::kHeadDim;
    T* out = static_cast<T*>(params_.out) + work.head * Traits::kHeadDim +
             (static_cast<int64_t>(work.batch) * params_.seqlen_q + work.q_row0) * row_stride;
#pragma unroll
    for (int i = 0; i < 64 * kChunks / 128; ++i) {
      const int row = warpgroup_ * 64 + (i * 128 + thread) / kChunks;
      const int chunk = (i * 128 + thread) % kChunks;
      const int q_row = work.p_tile + row - work.q_start;
      const uint4 value =
          reinterpret_cast<const uint4*>(staged)[row * kChunks + (chunk ^ (row % 8))];
      if (q_row >= 0 && q_row < work.q_len)
        *reinterpret_cast<uint4*>(out + q_row * row_stride + chunk * 8) = value;
    }
    named_barrier_sync(kEpilogueBarrier + warpgroup_,
                       128);  // before the next tile's rows are staged
  }

  const AttentionFwdParams& params_;
  typename Traits::Shared& shared_;
  const int warpgroup_;
  const int lane_;
  const int boxes_per_tile_;
  int row_;  // first of this thread's two rows in the tile
  uint32_t q_address_, anchor_address_;
  uint32_t step_ = 0;  // of the K and V pipelines
  uint32_t q_phase_ = 0;
};

}  // namespace longgen::sm90
