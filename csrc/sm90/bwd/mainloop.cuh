// A math warpgroup: dK and dV of 64 keys, and 64 x 64 of dQ of every query tile that passes.
//
// Scores are computed transposed, keys by queries: P and dS then lie in registers as dV += P^T dO
// and dK += dS^T Q want them, and only dQ = dS K needs dS in shared memory. Always some matrix
// product is in flight while a thread computes: dP during exp2, dV and the next tile's scores
// during dS, dK while dQ is put down.
#pragma once

#include "arch/sm90/barrier.cuh"
#include "arch/sm90/tma.cuh"
#include "arch/sm90/wgmma.cuh"
#include "attention/softmax.cuh"
#include "sm90/bwd/gradients.cuh"
#include "sm90/bwd/rows.cuh"
#include "sm90/bwd/score_gradients.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// Named barriers; 0 is __syncthreads, 1 the producer's.
constexpr int kClearBarrier = 2;  // + warpgroup: other sequences' rows are cleared

template <typename Traits>
class BwdMathWarpgroup {
  using T = typename Traits::T;
  static constexpr int kScores = Traits::kBlockM / 2;  // accumulators a thread
  static constexpr int kGradients = Traits::kHeadDim / 2;
  static constexpr int kChunks = Traits::kBlockM / 8;  // of queries; a thread has two of each
  static constexpr bool kTwoTiles = Traits::kTwoTilesFit;
  using Part = DqPart<Traits::kHeadDim>;
  static constexpr int kDq = Part::kFloats / 128;

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
      __syncwarp();
      release(shared_.item_empty[n % 2]);
    }
  }

 private:
  // Of the warpgroup. Asked for anew each time, so that nothing that follows from it lives through
  // the loop.
  __device__ __forceinline__ static int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread % 128;
  }

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
      uint32_t ds[kScores / 2] = {};
      for (; unseen > 1; --unseen) pass();
      // While the other warpgroup computes what this one has to wait for, the first scores.
      if (unseen > 0) offer_zeros();
      issue_scores(s, item, step_ + unseen, true);
      shared_.v_full.wait(n & 1);
      wgmma_wait<0>();
      pin(s);
      if (unseen > 0) add_query_gradient_of_others();
      for (int left = own.hi - own.lo - 1; left >= 0; --left) {
        step(dk, dv, s, ds, n, left > 0);
      }
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

  // One query tile, whose scores are in flight or there.
  __device__ __forceinline__ void step(float (&dk)[kGradients], float (&dv)[kGradients],
                                       float (&s)[kScores], uint32_t (&ds)[kScores / 2], uint32_t n,
                                       bool more) {
    const Item& item = shared_.items[n % 2];
    const uint32_t q_stage = step_ % Traits::kQStages;
    const uint32_t stage = step_ % Traits::kDoutStages;
    const uint32_t ds_address = shared_address(shared_.ds[step_ % 2]);
    const float* const lse_of_rows = shared_.stats[stage][0];
    const float* const delta_of_rows = shared_.stats[stage][1];
    uint32_t p[kScores / 2];
    float dp[kScores];
    float2 lse[kChunks], delta[kChunks];

    shared_.dout_full[stage].wait(step_ / Traits::kDoutStages & 1);
    clear_neighbours(shared_.dout[stage], item, shared_.steps[q_stage].p_tile);
    // dP follows the last tile's dK at once, or where two tiles do not fit, when dK is there: then
    // half of the scores are weighed beside dK, and their mask, a branch, keeps ptxas from moving
    // that behind the wait.
    constexpr int kBesideDk = kTwoTiles ? kScores : kScores / 2;
    read_stats<0, kTwoTiles ? kChunks : kChunks / 2>(lse, lse_of_rows);
    if constexpr (kTwoTiles)
      issue_transposed(dp, shared_address(shared_.v), shared_address(shared_.dout[stage]));
    pin(s);
    weigh<0, kBesideDk>(s, lse);
    if constexpr (!kTwoTiles) mask<0, kBesideDk>(s, n, shared_.steps[q_stage]);
    wgmma_wait<kTwoTiles ? 1 : 0>();
    keep(ds);
    if (step_ > 0) shared_.q_empty[(step_ - 1) % Traits::kQStages].arrive();
    if constexpr (!kTwoTiles) {
      issue_transposed(dp, shared_address(shared_.v), shared_address(shared_.dout[stage]));
      read_stats<kChunks / 2, kChunks>(lse, lse_of_rows);
    }
    weigh<kBesideDk, kScores>(s, lse);
    mask<kTwoTiles ? 0 : kBesideDk, kScores>(s, n, shared_.steps[q_stage]);
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack<T>(s[2 * i], s[2 * i + 1]);

    // dV, and as soon as there is room for them the next scores. Delta is read before those: both
    // their operands come from shared memory, where other reads then wait long. LSE likewise before
    // dP.
    issue_gradient(dv, p, shared_address(shared_.dout[stage]));
    if constexpr (kTwoTiles) {
      read_stats<0, kChunks>(delta, delta_of_rows);
      issue_scores(s, item, step_ + 1, more);
    }
    wgmma_wait<kTwoTiles ? 2 : 1>();
    pin(dp);
    if constexpr (!kTwoTiles) read_stats<0, kChunks>(delta, delta_of_rows);
    score_gradients(ds, p, dp, delta);
    store_score_gradients(ds, ds_address + ds_offset_);
    if constexpr (Traits::kAddsDq) {
      fence_async_proxy();
      __syncwarp();
      release(shared_.ds_full);
    }
    wgmma_wait<kTwoTiles ? 1 : 0>();
    keep(p);
    // Back from shared memory, into the registers that P had: there are none for both.
    if constexpr (kTwoTiles) load_score_gradients(ds, ds_address + ds_offset_);
    shared_.dout_empty[stage].arrive();  // every thread, as it read LSE and delta
    if constexpr (!kTwoTiles) issue_scores(s, item, step_ + 1, more);
    if constexpr (Traits::kAddsDq) {
      shared_.ds_full.wait(step_ & 1);
      float dq[kDq];
      issue_query_gradient<Traits::kBlockN>(dq, ds_address, 0);
      issue_gradient(dk, ds, shared_address(shared_.q[q_stage]));
      step_ = uniform(step_ + 1);
      float* const sums = query_gradient_sums(shared_.steps[q_stage].q_tile);
      wgmma_wait<1>();
      pin(dq);
      add_accumulators_to(sums, dq);
    } else {
      issue_gradient(dk, ds, shared_address(shared_.q[q_stage]));
      step_ = uniform(step_ + 1);
      wgmma_wait<1>();  // for the next scores: ptxas follows no other product into the next round
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
      issue_query_gradient<64>(dq, shared_address(shared_.ds[step_ % 2]), (1 - warpgroup_) * 64);
      wgmma_wait<0>();
      pin(dq);
      add_accumulators_to(query_gradient_sums(shared_.steps[step_ % Traits::kQStages].q_tile), dq);
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

  // S^T = K Q^T of tile `step`, when its queries are there.
  __device__ __forceinline__ void issue_scores(float (&s)[kScores], const Item& item, uint32_t step,
                                               bool exists) {
    const uint32_t stage = step % Traits::kQStages;
    if (exists) {
      shared_.q_full[stage].wait(step / Traits::kQStages & 1);
      clear_neighbours(shared_.q[stage], item, shared_.steps[stage].p_tile);
    }
    issue_transposed(s, shared_address(shared_.k), shared_address(shared_.q[stage]));
  }

  // D = A B^T: this warpgroup's keys by all queries, over head_dim.
  __device__ __forceinline__ void issue_transposed(float (&d)[kScores], uint32_t keys,
                                                   uint32_t queries) {
    // Opaque, or the compiler would compute all descriptors ahead of the branches before this, and
    // keep them in registers of its own.
    asm volatile("" : "+r"(keys));
    const uint64_t a = operand(keys + warpgroup_ * 64 * 128);
    const uint64_t b = operand(queries);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const uint64_t a_k = advance(a, k / 4 * Traits::kKeyPanelBytes + k % 4 * 32);
      const uint64_t b_k = advance(b, k / 4 * Traits::kQueryPanelBytes + k % 4 * 32);
      if (k == 0) {
        Wgmma<Traits::kBlockM, T>::template ss_first<false>(d, a_k, b_k);
      } else {
        Wgmma<Traits::kBlockM, T>::template ss<false>(d, a_k, b_k, true);
      }
    }
    wgmma_commit();
  }

  // D += A B: over queries; B is N-major: 16 queries are two groups of 8 rows of 128 bytes.
  __device__ __forceinline__ void issue_gradient(float (&d)[kGradients],
                                                 const uint32_t (&a)[kScores / 2],
                                                 uint32_t queries) {
    const uint64_t b = operand(queries, Traits::kQueryPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Traits::kBlockM / 16; ++k) {
      const uint32_t fragment[4] = {a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]};
      Wgmma<Traits::kHeadDim, T>::template rs<true>(d, fragment, advance(b, k * 2048), true);
    }
    wgmma_commit();
  }

  // dQ = dS K: this warpgroup's part, over kKeys keys from `first` on; K is N-major.
  template <int kKeys>
  __device__ __forceinline__ void issue_query_gradient(float (&dq)[kDq], uint32_t ds_address,
                                                       int first) {
    const Part part(warpgroup_);
    const uint64_t a = operand(ds_address + first / 64 * Traits::kQueryPanelBytes + part.row * 128);
    const uint64_t b = operand(shared_address(shared_.k) +
                               part.column / 64 * Traits::kKeyPanelBytes + first * 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      const uint64_t a_k = advance(a, k / 4 * Traits::kQueryPanelBytes + k % 4 * 32);
      const uint64_t b_k = advance(b, k * 2048);
      if (k == 0) {
        Wgmma<64, T>::template ss_first<true>(dq, a_k, b_k);
      } else {
        Wgmma<64, T>::template ss<true>(dq, a_k, b_k, true);
      }
    }
    wgmma_commit();
  }

  // The sums in memory of this warpgroup's part of a query tile's dQ. Known before the wait for dQ,
  // behind which the address would be computed otherwise, with no product but dK in flight.
  __device__ __forceinline__ float* query_gradient_sums(int64_t q_tile) const {
    float* sums = params_.dq_sum + q_tile * Traits::kDqFloats + Part(warpgroup_).offset;
    asm volatile("" : "+l"(sums));
    return sums;
  }

  // Reads LSE or delta of this thread's queries in chunks kFirst to kEnd - 1.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void read_stats(float2 (&stats)[kChunks], const float* of_rows) const {
#pragma unroll
    for (int c = kFirst; c < kEnd; ++c)
      stats[c] = reinterpret_cast<const float2*>(of_rows)[4 * c + lane_ % 4];
  }

  // From scores to weights exp2(S - LSE), accumulators kFirst to kEnd - 1.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void weigh(float (&s)[kScores], const float2 (&lse)[kChunks]) const {
#pragma unroll
    for (int i = kFirst; i < kEnd; ++i)
      s[i] = fast_exp2(s[i] * params_.scale_log2 - (i % 2 == 0 ? lse[i / 4].x : lse[i / 4].y));
  }

  // Weights become 0 where a query does not see the key, whatever is there.
  template <int kFirst, int kEnd>
  __device__ __forceinline__ void mask(float (&weights)[kScores], uint32_t n,
                                       const Step& step) const {
    if (!step.masked) return;
    const int column0 = step.p_tile + lane_ % 4 * 2;
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
