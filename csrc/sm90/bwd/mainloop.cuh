// A math warpgroup: dK and dV of 64 keys, and 64 x 64 of dQ of every query tile that passes.
//
// Scores are computed transposed, keys by queries: P lies in registers then as dV += P^T dO wants
// it. dK += dS^T Q and dQ = dS K read dS from shared memory. Beside all that a thread computes
// matrix products are in flight: dQ and dK beside the first half of exp2, dK beside the second and
// the way of dQ out of the registers, the next scores and dV beside dS.
#pragma once

#include "arch/sm90/barrier.cuh"
#include "arch/sm90/tma.cuh"
#include "attention/softmax.cuh"
#include "sm90/bwd/gradients.cuh"
#include "sm90/bwd/products.cuh"
#include "sm90/bwd/rows.cuh"
#include "sm90/bwd/score_gradients.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// Named barriers; 0 is __syncthreads, 1 the producer's.
constexpr int kClearBarrier = 2;   // + warpgroup: other sequences' rows are cleared
constexpr int kStoredBarrier = 4;  // + warpgroup: its dS is stored

template <typename Traits>
class BwdMathWarpgroup {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kBlockM / 2;  // accumulators a thread
  static constexpr int kGradients = Traits::kHeadDim / 2;
  static constexpr int kChunks = Traits::kBlockM / 8;  // of queries; a thread has two of each
  static constexpr bool kTwoTilesFit = Traits::kTwoTilesFit;
  static constexpr int kEarly = kScores / 2;  // scores that are weighed before dQ is there
  static constexpr int kDq = DqPart<Traits::kHeadDim>::kFloats / 128;

 public:
  __device__ BwdMathWarpgroup(const AttentionBwdParams& params, typename Traits::Shared& shared,
                              int warpgroup)
      : params_(params),
        shared_(shared),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % 32),
        ds_offset_(score_gradients_offset<Traits>(warpgroup, thread())) {}

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {
      shared_.item_full[n % 2].wait(n / 2 & 1);
      if (shared_.items[n % 2].stop) break;
      work(n);
      shared_.item_empty[n % 2].arrive();
    }
    wait_for_additions();
  }

 private:
  // Of the warpgroup. Asked for anew each time, so that nothing that follows from it lives through
  // the loop.
  __device__ __forceinline__ static int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
  }

  // Of all math warps.
  __device__ __forceinline__ int warp() const { return warpgroup_ * 4 + thread() / 32; }

  // The first of this thread's two rows in the key tile.
  __device__ __forceinline__ int key_row() const {
    const int t = thread();
    return warpgroup_ * 64 + t / 32 * 16 + t % 32 / 4;
  }

  // The same number, known to the compiler as the same in all lanes: descriptors of operands are
  // arithmetic in uniform registers then, and matrix instructions stand close together.
  __device__ __forceinline__ static uint32_t uniform(uint32_t x) {
    return __shfl_sync(0xffffffff, x, 0);
  }

  __device__ __forceinline__ void work(uint32_t n) {
    const Item& item = shared_.items[n % 2];
    const Steps own = steps_of_warpgroup<Traits::kBlockM>(params_.pattern, item, warpgroup_);
    int unseen = own.lo;  // steps before those
    float dk[kGradients], dv[kGradients];
#pragma unroll
    for (int i = 0; i < kGradients; ++i) dk[i] = dv[i] = 0.f;

    shared_.k_full.wait(n & 1);
    if (own.lo < own.hi) {
      float s[kScores];
      for (; unseen > 1; --unseen) pass();
      // While the other warpgroup computes what this one has to wait for, the first scores.
      if (unseen > 0) offer_zeros();
      wait_for_queries(item, step_ + unseen);
      issue_scores(s, step_ + unseen);
      shared_.v_full.wait(n & 1);
      wgmma_wait<0>();
      pin(s);
      if (unseen > 0) add_query_gradient_of_others();
      float2 lse[kChunks];
      read_stats(lse, shared_.lse[step_ % Traits::kQStages]);
      bool masked = shared_.steps[step_ % Traits::kQStages].masked;
      begin_weights(s, lse, n, step_ % Traits::kQStages, masked);
      for (int i = own.lo; i < own.hi; ++i) step(dk, dv, s, masked, n, i == own.lo, i + 1 < own.hi);
      if constexpr (Traits::kAddsDq) add_query_gradient(step_ - 1);
      wgmma_wait<0>();
      pin(dk);
      pin(dv);
    } else {
      shared_.v_full.wait(n & 1);
    }
    for (unseen = item.steps - own.hi; unseen > 0; --unseen) pass();
    release(shared_.keys_empty);
    store_gradients<Traits>(params_, shared_.items[n % 2], shared_.rows[n % 2], warpgroup_,
                            key_row(), dk, dv);
  }

  // One query tile, whose scores are there and weighed by half, behind dK of the tile before.
  __device__ __forceinline__ void step(float (&dk)[kGradients], float (&dv)[kGradients],
                                       float (&s)[kScores], bool& masked, uint32_t n, bool first,
                                       bool more) {
    const Item& item = shared_.items[n % 2];
    const uint32_t q_stage = step_ % Traits::kQStages;
    const uint32_t stage = step_ % Traits::kDoutStages;
    const uint32_t ds_address = shared_address(shared_.ds[step_ % 2]);
    uint32_t p[kScores / 2], ds[kScores / 2];
    float dp[kScores];

    // The registers of dP were dQ's, which is on its way to shared memory.
    weigh<kEarly, kScores>(s, n, q_stage, masked);
    shared_.dout_full[stage].wait(step_ / Traits::kDoutStages & 1);
    clear_neighbours(shared_.dout[stage], item, shared_.steps[q_stage].p_tile);
    issue_with_keys(dp, shared_.v, shared_.dout[stage]);
    if constexpr (Traits::kAddsDq) {
      if (!first) add_query_gradient(step_ - 1);
    }
    wgmma_wait<1>();
    if (step_ > 0) shared_.q_empty[(step_ - 1) % Traits::kQStages].arrive();
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    if (more) wait_for_queries(item, step_ + 1);
    float2 delta[kChunks];
    if constexpr (kTwoTilesFit) read_stats(delta, shared_.delta[stage]);

    // The next scores as soon as there is room for them, and dV behind them: its A operand is in
    // registers, and shared memory has time for dS, the fence and LSE, which wait long otherwise.
    if constexpr (kTwoTilesFit) issue_scores(s, step_ + 1);
    issue_from_registers<T, Traits::kHeadDim, Traits::kBlockM, Traits::kQueryPanelBytes>(
        dv, p, shared_address(shared_.dout[stage]));
    wgmma_wait<kTwoTilesFit ? 2 : 1>();
    pin(dp);
    if constexpr (!kTwoTilesFit) read_stats(delta, shared_.delta[stage]);
    score_gradients(ds, p, dp, delta);
    store_score_gradients(ds, ds_address + ds_offset_);
    fence_async_proxy();
    if constexpr (Traits::kAddsDq) {
      __syncwarp();
      release(shared_.ds_full);
    } else {
      named_barrier_sync(kStoredBarrier + warpgroup_, 128);
    }
    if constexpr (!kTwoTilesFit) issue_scores(s, step_ + 1);
    const uint32_t next_stage = more ? (step_ + 1) % Traits::kQStages : q_stage;
    float2 lse[kChunks];
    read_stats(lse, shared_.lse[next_stage]);
    masked = shared_.steps[next_stage].masked;
    float dq[kDq];
    if constexpr (Traits::kAddsDq) {
      shared_.ds_full.wait(step_ & 1);
      issue_query_gradient<Traits, Traits::kBlockN>(dq, ds_address, shared_address(shared_.k), 0,
                                                    warpgroup_);
    }
    issue_key_gradient<Traits>(dk, ds_address, shared_address(shared_.q[q_stage]), warpgroup_);
    step_ = uniform(step_ + 1);
    wgmma_wait<Traits::kAddsDq ? 2 : 1>();
    keep(p);
    shared_.dout_empty[stage].arrive();  // every thread, as it read delta
    begin_weights(s, lse, n, next_stage, masked);
    if constexpr (Traits::kAddsDq) {
      wgmma_wait<1>();
      pin(dq);
      put_query_gradient(dq);
    }
  }

  // A step in which no query sees a key of this warpgroup: what is left of it is to add its part of
  // dQ, from the other warpgroup's keys. In two halves: what that one waits for, and what waits for
  // it.
  __device__ __forceinline__ void pass() {
    offer_zeros();
    add_query_gradient_of_others();
  }

  __device__ __forceinline__ void offer_zeros() {
    const uint32_t stage = step_ % Traits::kDoutStages;
    // Not before they are there: the arrivals below are of this round.
    shared_.q_full[step_ % Traits::kQStages].wait(step_ / Traits::kQStages & 1);
    shared_.dout_full[stage].wait(step_ / Traits::kDoutStages & 1);
    if (step_ > 0) shared_.q_empty[(step_ - 1) % Traits::kQStages].arrive();
    shared_.dout_empty[stage].arrive();
    if constexpr (Traits::kAddsDq) {
      const uint32_t zeros[kScores / 2] = {};
      store_score_gradients(zeros, shared_address(shared_.ds[step_ % 2]) + ds_offset_);
      fence_async_proxy();
      __syncwarp();
      release(shared_.ds_full);
    }
  }

  __device__ __forceinline__ void add_query_gradient_of_others() {
    if constexpr (Traits::kAddsDq) {
      shared_.ds_full.wait(step_ & 1);
      float dq[kDq];
      issue_query_gradient<Traits, 64>(dq, shared_address(shared_.ds[step_ % 2]),
                                       shared_address(shared_.k), (1 - warpgroup_) * 64,
                                       warpgroup_);
      wgmma_wait<0>();
      pin(dq);
      put_query_gradient(dq);
      add_query_gradient(step_);
    }
    step_ = uniform(step_ + 1);
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

  __device__ __forceinline__ void wait_for_queries(const Item& item, uint32_t step) {
    const uint32_t stage = step % Traits::kQStages;
    shared_.q_full[stage].wait(step / Traits::kQStages & 1);
    clear_neighbours(shared_.q[stage], item, shared_.steps[stage].p_tile);
  }

  // S^T = K Q^T of tile `step`.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores], uint32_t step) {
    issue_with_keys(s, shared_.k, shared_.q[step % Traits::kQStages]);
  }

  // This warpgroup's keys, K or V, by all queries, Q or dO, over head_dim.
  __device__ __forceinline__ void issue_with_keys(float (&d)[kScores], const uint8_t* keys,
                                                  const uint8_t* queries) {
    uint32_t a = shared_address(keys);
    const uint32_t b = shared_address(queries);
    // Opaque, or the compiler would compute all descriptors ahead of the branches before this, and
    // keep them in registers of its own.
    asm volatile("" : "+r"(a));
    issue_transposed<T, Traits::kBlockM, Traits::kHeadDim, Traits::kKeyPanelBytes,
                     Traits::kQueryPanelBytes>(d, a + warpgroup_ * 64 * 128, b);
  }

  // Puts a tile's dQ down in shared memory, a warp its own part, when the last one's was read.
  __device__ __forceinline__ void put_query_gradient(const float (&dq)[kDq]) {
    float* const part = shared_.dq[warp()];
    wait_for_reads();
    __syncwarp();
    store_accumulators(part, dq);
  }

  // Adds what lies there to the sums of the query tile of step `step`.
  __device__ __forceinline__ void add_query_gradient(uint32_t step) {
    fence_async_proxy();
    __syncwarp();
    if (lane_ == 0) {
      float* const sums =
          params_.dq_sum +
          static_cast<int64_t>(shared_.steps[step % Traits::kQStages].q_tile) * Traits::kDqFloats;
      add_floats(sums + warp() * Traits::kDqFloatsOfWarp, shared_.dq[warp()],
                 Traits::kDqFloatsOfWarp * sizeof(float));
    }
    __syncwarp();
  }

  // Reads LSE or delta of this thread's queries.
  __device__ __forceinline__ void read_stats(float2 (&stats)[kChunks],
                                             const float* of_queries) const {
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      const float4 x = *reinterpret_cast<const float4*>(
          of_queries + statistics_slot<Traits::kBlockM>(lane_ % 4 * 2) + 2 * c);
      stats[c] = {x.x, x.y};
      stats[c + 1] = {x.z, x.w};
    }
  }

  // From scores to S - LSE, and the first weights.
  __device__ __forceinline__ void begin_weights(float (&s)[kScores], const float2 (&lse)[kChunks],
                                                uint32_t n, uint32_t q_stage, bool masked) const {
    pin(s);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      s[i] = s[i] * params_.scale_log2 - (i % 2 == 0 ? lse[i / 4].x : lse[i / 4].y);
    weigh<0, kEarly>(s, n, q_stage, masked);
    pin(s);
  }

  // To weights exp2(S - LSE), accumulators kFirst to kEnd - 1; where a query does not see the key
  // they become 0, whatever is there.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void weigh(float (&weights)[kScores], uint32_t n, uint32_t q_stage,
                                        bool masked) const {
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i) weights[i] = fast_exp2(weights[i]);
    if (!masked) return;
    const int column0 = shared_.steps[q_stage].p_tile + lane_ % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Run seen = shared_.rows[n % 2][key_row() + 8 * half].seen;
      const int lo = seen.lo - column0;
      const int hi = seen.hi - column0;
#pragma unroll
      for (int c = kFirst / 4; c < kEnd / 4; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = weights[4 * c + 2 * half + e];
          weight = (8 * c + e >= lo) & (8 * c + e < hi) ? weight : 0.f;
        }
      }
    }
  }

  // dS = P (dP - delta), from the rounded weights that dV sums too: they need half the registers.
  __device__ __forceinline__ void score_gradients(uint32_t (&ds)[kScores / 2],
                                                  const uint32_t (&p)[kScores / 2],
                                                  const float (&dp)[kScores],
                                                  const float2 (&delta)[kChunks]) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const float2 offset = delta[c];
#pragma unroll
      for (int i = 2 * c; i < 2 * c + 2; ++i) {
        const float2 weight = unpack<T>(p[i]);
        ds[i] = pack<T>(weight.x * (dp[2 * i] - offset.x), weight.y * (dp[2 * i + 1] - offset.y));
      }
    }
  }

  // In a packed batch a query tile may reach into other sequences, or into rows of none. What they
  // add is weighed by 0, but 0 times NaN is NaN: they become 0. Both warpgroups write the same
  // zeros.
  __device__ __forceinline__ void clear_neighbours(uint8_t* tile, const Item& item, int p_tile) {
    if (params_.cu_seqlens_q == nullptr) return;
    const int lo = item.sequence.q_start - p_tile;
    const int hi = item.q_end() - p_tile;
    if (lo <= 0 && hi >= Traits::kBlockM) return;
    for (int chunk = threadIdx.x % 128; chunk < Traits::kPanels * Traits::kBlockM * 8;
         chunk += 128) {  // of 16 bytes; the swizzle permutes them within a row only
      const int row = chunk / 8 % Traits::kBlockM;
      if (row < lo || row >= hi) reinterpret_cast<uint4*>(tile)[chunk] = uint4{0, 0, 0, 0};
    }
    fence_async_proxy();
    named_barrier_sync(kClearBarrier + warpgroup_, 128);
  }

  const AttentionBwdParams& params_;
  typename Traits::Shared& shared_;
  const int warpgroup_;
  const int lane_;
  const uint32_t ds_offset_;  // of this thread's first row in a tile of dS
  uint32_t step_ = 0;         // of the Q, dO and dS pipelines
};

}  // namespace longgen::sm90
