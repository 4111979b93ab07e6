// dQ by query tile, in one order: the rows' half of the deterministic backward pass.
//
// Queries and their dO stay in shared memory, the keys that they see pass in the order of the
// forward kernel's boxes, and dQ is added up in registers.
#pragma once

#include "arch/sm90/registers.cuh"
#include "arch/sm90/tma.cuh"
#include "attention/key_mask.cuh"
#include "attention/softmax.cuh"
#include "sm90/bwd/products.cuh"
#include "sm90/bwd/rows.cuh"
#include "sm90/bwd/traits.cuh"
#include "sm90/work.cuh"

namespace longgen::sm90 {

template <typename T_, int kHeadDim_>
struct DqTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 128;  // two math warpgroups of 64 queries
  static constexpr int kBlockN = 64;   // so that a tile's scores and the next one's fit
  static constexpr int kQueryBox = query_rows(kHeadDim);  // rows that the copy engine fetches
  // K is held from the scores of its tile, issued a tile ahead, to its dQ; V for one tile.
  static constexpr int kKStages = 4;
  static constexpr int kVStages = 3;
  static constexpr int kMathWarpgroups = kBlockM / 64;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = 128 * (1 + kMathWarpgroups);
  static constexpr int kProducerRegisters = 24;
  static constexpr int kMathRegisters = 240;
  static_assert(kProducerRegisters + kMathWarpgroups * kMathRegisters <= 504);
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr uint32_t kQueryPanelBytes = kBlockM * 128;
  static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr uint32_t kKeyPanelBytes = kBlockN * 128;
  static constexpr uint32_t kKeyBytes = kPanels * kKeyPanelBytes;

  struct Shared {
    // Swizzled tiles repeat every 1024 bytes.
    alignas(1024) uint8_t q[kQueryBytes];
    alignas(1024) uint8_t dout[kQueryBytes];
    alignas(1024) uint8_t k[kKStages][kKeyBytes];
    alignas(1024) uint8_t v[kVStages][kKeyBytes];
    Mbarrier queries_full, queries_empty;
    Mbarrier k_full[kKStages], k_empty[kKStages];
    Mbarrier v_full[kVStages], v_empty[kVStages];
  };
  static constexpr int kSharedBytes =
      sizeof(Shared) + 1024;  // dynamic shared memory is aligned to 16 bytes only
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
};

// The item of round `round`, its keys and how many tiles they make; false: there is none.
template <typename Traits>
struct DqItem {
  Work work;
  KeyBoxes boxes;
  int tiles;

  __device__ __forceinline__ DqItem(const AttentionBwdParams& params, int index)
      : work(work_item<Traits::kBlockM>(params, params.plan.row_tiles, index)),
        boxes(params.pattern, params.plan.log2_box, work.p_first(), work.p_last(Traits::kBlockM),
              work.k_start, work.k_start + work.k_len, work.head, params.q_heads,
              work.head / params.plan.group) {
    const int boxes_per_tile = Traits::kBlockN >> params.plan.log2_box;
    tiles = work.empty() ? 0 : (boxes.count() + boxes_per_tile - 1) / boxes_per_tile;
  }
};

// One warp.
template <typename Traits>
__device__ void produce_keys(const AttentionBwdParams& params, const CUtensorMap& q_map,
                             const CUtensorMap& dout_map, const CUtensorMap& k_map,
                             const CUtensorMap& v_map, typename Traits::Shared& shared) {
  const int lane = threadIdx.x % 32;
  const int boxes_per_tile = Traits::kBlockN >> params.plan.log2_box;
  // Lane l copies panel l / boxes_per_tile of box l % boxes_per_tile.
  const int my_box = lane % boxes_per_tile;
  const int my_panel = lane / boxes_per_tile;
  const bool copies = lane < boxes_per_tile * Traits::kPanels;
  const int my_offset = my_panel * Traits::kKeyPanelBytes + (my_box << params.plan.log2_box) * 128;

  uint32_t step = 0;  // of the K and V pipelines
  uint32_t queries_phase = 0;
  for (int round = 0; round * gridDim.x < params.plan.row_items; ++round) {
    const int index = work_index(round, params.plan.row_items);
    if (index < 0) continue;
    const DqItem<Traits> item(params, index);
    if (item.tiles == 0) continue;
    const Work& work = item.work;
    const int kv_head = work.head / params.plan.group;

    shared.queries_empty.wait(queries_phase ^ 1);
    if (lane == 0) shared.queries_full.arrive_and_expect(2 * Traits::kQueryBytes);
    __syncwarp();
    // Lane l copies box l / kPanels of panel l % kPanels.
    if (lane < Traits::kBlockM / Traits::kQueryBox * Traits::kPanels) {
      const int first = lane / Traits::kPanels * Traits::kQueryBox;
      const int panel = lane % Traits::kPanels;
      const int row = work.q_row0 + work.p_tile - work.q_start + first;
      const int offset = panel * Traits::kQueryPanelBytes + first * 128;
      copy_box(q_map, shared.queries_full, shared.q + offset, panel * 64, row, work.head,
               work.batch);
      copy_box(dout_map, shared.queries_full, shared.dout + offset, panel * 64, row, work.head,
               work.batch);
    }
    queries_phase ^= 1;

    for (int tile = 0; tile < item.tiles; ++tile, ++step) {
      const int row =
          item.boxes[tile * boxes_per_tile + my_box].position - work.k_start + work.k_row0;
      const int k_stage = step % Traits::kKStages;
      shared.k_empty[k_stage].wait((step / Traits::kKStages & 1) ^ 1);
      if (lane == 0) shared.k_full[k_stage].arrive_and_expect(Traits::kKeyBytes);
      __syncwarp();
      if (copies)
        copy_box(k_map, shared.k_full[k_stage], shared.k[k_stage] + my_offset, my_panel * 64, row,
                 kv_head, work.batch);
      const int v_stage = step % Traits::kVStages;
      shared.v_empty[v_stage].wait((step / Traits::kVStages & 1) ^ 1);
      if (lane == 0) shared.v_full[v_stage].arrive_and_expect(Traits::kKeyBytes);
      __syncwarp();
      if (copies)
        copy_box(v_map, shared.v_full[v_stage], shared.v[v_stage] + my_offset, my_panel * 64, row,
                 kv_head, work.batch);
    }
  }
}

template <typename Traits>
class DqMathWarpgroup {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kBlockN / 2;  // accumulators a thread
  static constexpr int kGradients = Traits::kHeadDim / 2;
  static constexpr int kClearBarrier = 1;  // + warpgroup: other sequences' rows are cleared

 public:
  __device__ DqMathWarpgroup(const AttentionBwdParams& params, typename Traits::Shared& shared,
                             int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % 32),
        boxes_per_tile_(Traits::kBlockN >> params.plan.log2_box) {}

  __device__ __forceinline__ void run() {
    for (int round = 0; round * gridDim.x < params_.plan.row_items; ++round) {
      const int index = work_index(round, params_.plan.row_items);
      if (index < 0) continue;
      const DqItem<Traits> item(params_, index);
      if (!item.work.empty()) attend(item);
    }
  }

 private:
  __device__ __forceinline__ void attend(const DqItem<Traits>& item) {
    const Work& work = item.work;
    const int p0 = work.p_tile + warpgroup_ * 64 + accumulator_row();
    float dq[kGradients];
#pragma unroll
    for (int i = 0; i < kGradients; ++i) dq[i] = 0.f;
    if (item.tiles > 0) {
      float lse[2], delta[2];
      find_statistics(work, p0, lse, delta);
      float s[kScores];
      uint32_t ds[kScores / 2] = {};
      shared_.queries_full.wait(queries_phase_);
      queries_phase_ ^= 1;
      issue_scores(s, item, 0);
      wgmma_wait<0>();
      for (int tile = 0; tile < item.tiles; ++tile) {
        const uint32_t k_stage = step_ % Traits::kKStages;
        const uint32_t v_stage = step_ % Traits::kVStages;
        const int first_box = tile * boxes_per_tile_;
        shared_.v_full[v_stage].wait(step_ / Traits::kVStages & 1);
        clear_neighbours(shared_.v[v_stage], item, first_box);
        float dp[kScores];
        issue_with_queries(dp, shared_.dout, shared_.v[v_stage]);
        // Then dP is the only product in flight: scores are there, the last tile's dQ is added.
        wgmma_wait<1>();
        pin(s);
        keep(ds);
        if (tile > 0) release(shared_.k_empty[(step_ - 1) % Traits::kKStages]);
        if (some_masked(item.boxes, first_box, boxes_per_tile_))
          hide_others(s, visible_keys<kScores>(
                             params_.pattern,
                             [&](int b) { return key_box(item.boxes, item.boxes[first_box + b]); },
                             params_.plan.log2_box, p0, 0));
        float p[kScores];
#pragma unroll
        for (int i = 0; i < kScores; ++i)
          p[i] = fast_exp2(s[i] * params_.scale_log2 - lse[i / 2 % 2]);
        ++step_;
        issue_scores(s, item, tile + 1);
        wgmma_wait<1>();
        pin(dp);
        release(shared_.v_empty[v_stage]);
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i)
          ds[i] = pack<T>(p[2 * i] * (dp[2 * i] - delta[i % 2]),
                          p[2 * i + 1] * (dp[2 * i + 1] - delta[i % 2]));
        issue_from_registers<T, Traits::kHeadDim, Traits::kBlockN, Traits::kKeyPanelBytes>(
            dq, ds, shared_address(shared_.k[k_stage]));
        wgmma_wait<1>();  // for the next scores: ptxas follows no other product into the next round
      }
      wgmma_wait<0>();
      pin(dq);
      release(shared_.k_empty[(step_ - 1) % Traits::kKStages]);
      release(shared_.queries_empty);
    }
    T* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q_row = p0 + 8 * half - work.q_start;
      const int64_t row = static_cast<int64_t>(work.batch) * params_.seqlen_q + work.q_row0 + q_row;
      rows[half] = q_row < 0 || q_row >= work.q_len
                       ? nullptr
                       : static_cast<T*>(params_.dq) +
                             (row * params_.q_heads + work.head) * Traits::kHeadDim;
    }
    store_rows(rows[0], rows[1], dq, params_.softmax_scale);
  }

  // Of this thread's two rows; an LSE of +inf for those that do not exist.
  __device__ __forceinline__ void find_statistics(const Work& work, int p0, float (&lse)[2],
                                                  float (&delta)[2]) {
    constexpr int kRows = query_rows(Traits::kHeadDim);  // of the statistics' tiles
    const int tile0 = first_query_tile<kRows>(params_, work, work.head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = p0 + 8 * half;
      lse[half] = INFINITY;
      delta[half] = 0.f;
      if (p < work.q_start || p >= work.q_start + work.q_len) continue;
      const int tile = tile0 + (p - (work.q_start & -kRows)) / kRows;
      const float* stats = params_.stats +
                           static_cast<int64_t>(tile) * 2 * statistics_floats(kRows) +
                           statistics_slot<kRows>(p & (kRows - 1));
      lse[half] = stats[0];
      delta[half] = stats[statistics_floats(kRows)];
    }
  }

  // One arrival a warp: a warp's own wgmma_wait says nothing about its neighbours.
  __device__ __forceinline__ void release(Mbarrier& barrier) {
    if (lane_ == 0) barrier.arrive();
  }

  // Registers that a product in flight reads live until it is waited for.
  __device__ __forceinline__ static void keep(uint32_t (&a)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) asm volatile("" : "+r"(a[i])::"memory");
  }

  // S = Q K^T of tile `tile` in step `step_`. Behind the last tile the product is of no use, but a
  // branch around it would keep the assembler from overlapping any.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores], const DqItem<Traits>& item,
                                               int tile) {
    const uint32_t stage = step_ % Traits::kKStages;
    if (tile < item.tiles) {
      shared_.k_full[stage].wait(step_ / Traits::kKStages & 1);
      clear_neighbours(shared_.k[stage], item, tile * boxes_per_tile_);
    }
    issue_with_queries(s, shared_.q, shared_.k[stage]);
  }

  // This warpgroup's queries, Q or dO, by all keys, K or V, over head_dim.
  __device__ __forceinline__ void issue_with_queries(float (&d)[kScores], const uint8_t* queries,
                                                     const uint8_t* keys) {
    issue_transposed<T, Traits::kBlockN, Traits::kHeadDim, Traits::kQueryPanelBytes,
                     Traits::kKeyPanelBytes>(d, shared_address(queries) + warpgroup_ * 64 * 128,
                                             shared_address(keys));
  }

  // In a packed batch a tile may reach into the next sequence, or into rows of none. Their scores'
  // gradients are 0, but 0 times NaN is NaN: the rows become 0. Both warpgroups write the same
  // zeros.
  __device__ __forceinline__ void clear_neighbours(uint8_t* tile, const DqItem<Traits>& item,
                                                   int first_box) {
    if (params_.cu_seqlens_k == nullptr) return;
    bool wrote = false;
    const int log2_box = params_.plan.log2_box;
    for (int b = 0; b < boxes_per_tile_; ++b) {
      const int row0 = item.boxes[first_box + b].position - item.work.k_start;  // in the sequence
      if (row0 >= 0 && row0 + (1 << log2_box) <= item.work.k_len) continue;
      wrote = true;
      for (int chunk = threadIdx.x % 128; chunk < Traits::kPanels * 8 << log2_box;
           chunk += 128) {  // of 16 bytes; the swizzle permutes them within a row only
        const int row = chunk / 8 & ((1 << log2_box) - 1);
        if (row0 + row >= 0 && row0 + row < item.work.k_len) continue;
        uint8_t* panel = tile + (chunk / 8 >> log2_box) * Traits::kKeyPanelBytes;
        reinterpret_cast<uint4*>(panel + ((b << log2_box) + row) * 128)[chunk % 8] =
            uint4{0, 0, 0, 0};
      }
    }
    if (!wrote) return;
    fence_async_proxy();
    named_barrier_sync(kClearBarrier + warpgroup_, 128);
  }

  const AttentionBwdParams& params_;
  typename Traits::Shared& shared_;
  const int warpgroup_;
  const int lane_;
  const int boxes_per_tile_;
  uint32_t step_ = 0;  // of the K and V pipelines
  uint32_t queries_phase_ = 0;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_dq_rows_kernel(const __grid_constant__ AttentionBwdParams params,
                       const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap dout_map,
                       const __grid_constant__ CUtensorMap k_map,
                       const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ uint8_t dynamic_shared[];
  // Aligned by an offset: a pointer made from an integer would no longer be known to be shared.
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(
      dynamic_shared + (-shared_address(dynamic_shared) & 1023));

  if (threadIdx.x == 0) {
    prefetch_descriptor(q_map);
    prefetch_descriptor(dout_map);
    prefetch_descriptor(k_map);
    prefetch_descriptor(v_map);
    shared.queries_full.init(1);
    shared.queries_empty.init(Traits::kMathWarps);
    for (int stage = 0; stage < Traits::kKStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.k_empty[stage].init(Traits::kMathWarps);
    }
    for (int stage = 0; stage < Traits::kVStages; ++stage) {
      shared.v_full[stage].init(1);
      shared.v_empty[stage].init(Traits::kMathWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  // The same in every thread of a warp, and known to be so.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    give_registers<Traits::kProducerRegisters>();
    if (warp == 0) produce_keys<Traits>(params, q_map, dout_map, k_map, v_map, shared);
  } else {
    take_registers<Traits::kMathRegisters>();
    DqMathWarpgroup<Traits>(params, shared, warp / 4 - 1).run();
  }
}

}  // namespace longgen::sm90
