// A warp of the decode kernel: scores, online softmax and output of the tile's rows against the
// chunks of keys that are this warp's.
#pragma once

#include "arch/sm80/cp_async.cuh"
#include "arch/sm80/mma.cuh"
#include "attention/cache_slots.cuh"
#include "attention/softmax.cuh"
#include "decode/traits.cuh"
#include "params.h"

namespace longgen::decode {

template <typename Traits>
class WarpStream {
  using T = typename Traits::T;
  using Stage = typename Traits::Stage;
  using Seen = typename Traits::Seen;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kRowGroups = Traits::kRowGroups;
  static constexpr int kPieces = kHeadDim / 8;           // of 16 bytes, in a row
  static constexpr int kCopies = kChunk * kPieces / 32;  // a thread, of K and of V each
  static constexpr int kSteps = kHeadDim / 16;           // of a matrix instruction's 16 columns
  static constexpr int kScores = kChunk / 2;             // accumulators a thread and row group
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr float kLag = 8.f;  // see OnlineSoftmax

 public:
  // `seen` and `stages` are this warp's parts of shared memory; `q` is the block's.
  __device__ WarpStream(const DecodeParams& params, const CacheSlots& slots, int sequence,
                        int kv_head, const T* q, Seen (*seen)[kChunk], Stage* stages)
      : params_(params),
        slots_(slots),
        sequence_(sequence),
        kv_head_(kv_head),
        lane_(threadIdx.x % 32),
        q_address_(sm80::shared_address(q)),
        seen_(seen),
        stages_(stages) {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) maximum_[g][0] = maximum_[g][1] = -INFINITY;
  }

  // Starts the copies of the first of this warp's chunks: first, first + kWarps, ... below end.
  __device__ __forceinline__ void start(int first, int end) {
    first_ = next_ = first;
    end_ = end;
    for (int i = 1; i < params_.stages; ++i) fetch();
  }

  // Attends to the chunks. `p` holds the query positions of this thread's two rows of each group,
  // p_first and p_last bound those of the tile.
  __device__ __forceinline__ void run(const int (&p)[kRowGroups][2], int p_first, int p_last) {
    if constexpr (Traits::kQInRegisters) {
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) sm80::load_matrices(q_[g][step], q_tile(g, step));
      }
    }
    int read = 0;
    for (int chunk = first_; chunk < end_; chunk += Traits::kWarps) {
      if (params_.stages == 2)
        sm80::wait_for_copies<0>();
      else
        sm80::wait_for_copies<1>();
      __syncwarp();  // every lane's copies are there, and no lane reads the stage that is next
      fetch();
      attend(read, p, p_first, p_last);
      read = advanced(read);
    }
    sm80::wait_for_copies<0>();
    __syncwarp();
  }

  // After run: the output, not divided by the sum, and maximum and sum of each row. `out` may be
  // the memory of the stages.
  __device__ __forceinline__ void store(float* out, float* maximum, float* sum) const {
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = g * 16 + half * 8 + lane_ / 4;
        const float total = quad_sum(sum_[g][half]);
        if (lane_ % 4 == 0) {
          maximum[row] = maximum_[g][half];
          sum[row] = total;
        }
        float* const target = out + row * Traits::kOutStride + lane_ % 4 * 2;
#pragma unroll
        for (int i = 0; i < kOutputs / 4; ++i)
          *reinterpret_cast<float2*>(target + i * 8) =
              make_float2(out_[g][4 * i + 2 * half], out_[g][4 * i + 2 * half + 1]);
      }
    }
  }

 private:
  __device__ __forceinline__ int advanced(int stage) const {
    return stage + 1 == params_.stages ? 0 : stage + 1;
  }

  // Where this lane's row of Q's fragment lies: matrices are rows 0-7, rows 8-15 of columns 0-7,
  // then of columns 8-15.
  __device__ __forceinline__ uint32_t q_tile(int group, int step) const {
    const int row = group * 16 + lane_ % 16, column = step * 16 + lane_ / 16 * 8;
    return q_address_ + (row * Traits::kStride + column) * sizeof(T);
  }

  // Starts the copies of the next chunk, or an empty group behind the last one.
  __device__ __forceinline__ void fetch() {
    const int stage = write_;
    if (next_ < end_) {
      const CacheSlots::Token token = slots_.token(next_, lane_ % kChunk);
      const int64_t offset = slot_offset(params_.cache, sequence_, kv_head_, token.slot);
      if (lane_ < kChunk) seen_[stage][lane_] = {token.position, offset < 0 ? -1 : token.until};
      const T* const k = static_cast<const T*>(params_.cache.k);
      const T* const v = static_cast<const T*>(params_.cache.v);
      const uint32_t k_shared = sm80::shared_address(stages_[stage].k);
      const uint32_t v_shared = sm80::shared_address(stages_[stage].v);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int piece = i * 32 + lane_;
        const int row = piece / kPieces, column = piece % kPieces * 8;
        const int64_t source = __shfl_sync(0xffffffff, offset, row);
        const bool exists = source >= 0;
        const int64_t from = exists ? source + column : 0;
        const uint32_t to = (row * Traits::kStride + column) * sizeof(T);
        sm80::copy_16_bytes(k_shared + to, k + from, exists);
        sm80::copy_16_bytes(v_shared + to, v + from, exists);
      }
    }
    sm80::commit_copies();
    next_ += Traits::kWarps;
    write_ = advanced(write_);
  }

  __device__ __forceinline__ void attend(int stage, const int (&p)[kRowGroups][2], int p_first,
                                         int p_last) {
    float s[kRowGroups][kScores];
    scores(s, sm80::shared_address(stages_[stage].k));
    mask(s, seen_[stage], p, p_first, p_last);
    uint32_t weights[kRowGroups][4];
    bool grown = false;
    float rescale[kRowGroups][2];
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) grown |= soften(s[g], g, half, rescale[g][half]);
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[g][i] = pack<T>(s[g][2 * i], s[g][2 * i + 1]);
    }
    if (__any_sync(0xffffffff, grown)) {
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) out_[g][i] *= rescale[g][i / 2 % 2];
      }
    }
    accumulate(weights, sm80::shared_address(stages_[stage].v));
  }

  // S = Q K^T: of K the matrices are keys 0-7 of columns 0-7 and 8-15, then keys 8-15.
  __device__ __forceinline__ void scores(float (&s)[kRowGroups][kScores], uint32_t k_address) {
    const int key = lane_ / 16 * 8 + lane_ % 8, column = lane_ / 8 % 2 * 8;
    const uint32_t from = k_address + (key * Traits::kStride + column) * sizeof(T);
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[g][i] = 0.f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      sm80::load_matrices(b, from + step * 16 * sizeof(T));
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) {
        uint32_t a[4];
        if constexpr (Traits::kQInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = q_[g][step][i];
        } else {
          sm80::load_matrices(a, q_tile(g, step));
        }
        sm80::multiply_add<T>(s[g], a, b[0], b[1]);
        sm80::multiply_add<T>(s[g] + 4, a, b[2], b[3]);
      }
    }
  }

  // Of a row that does not see a key the score becomes -inf. Score 4 * j + i is key 8 * j + 2 *
  // (lane % 4) + i % 2.
  __device__ __forceinline__ void mask(float (&s)[kRowGroups][kScores], const Seen* seen,
                                       const int (&p)[kRowGroups][2], int p_first, int p_last) {
    const int4 low = *reinterpret_cast<const int4*>(seen + lane_ % 4 * 2);
    const int4 high = *reinterpret_cast<const int4*>(seen + 8 + lane_ % 4 * 2);
    const int from[4] = {low.x, low.z, high.x, high.z}, until[4] = {low.y, low.w, high.y, high.w};
    bool all = true;
#pragma unroll
    for (int i = 0; i < 4; ++i) all &= from[i] <= p_first && until[i] >= p_last;
    if (__all_sync(0xffffffff, all)) return;
#pragma unroll
    for (int g = 0; g < kRowGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int key = i / 4 * 2 + i % 2, position = p[g][i / 2 % 2];
        const bool sees = (from[key] <= position) & (position <= until[key]);
        s[g][i] = sees ? s[g][i] : -INFINITY;
      }
    }
  }

  // Turns one row's scores into weights relative to a maximum that may lag (OnlineSoftmax says
  // why); returns whether it moved, and what earlier outputs are then multiplied by.
  __device__ __forceinline__ bool soften(float (&s)[kScores], int g, int half, float& rescale) {
    float* const x = s + 2 * half;
    const float scale = params_.scale_log2;
    const float largest = quad_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[4], x[5])));
    float& maximum = maximum_[g][half];
    const bool grows = (largest - maximum) * scale > kLag;  // -inf minus -inf is NaN: no
    const float now = grows ? largest : maximum;
    rescale = grows ? fast_exp2((maximum - now) * scale) : 1.f;
    maximum = now;
    // A row that has seen nothing keeps -inf; 0 in its place makes its weights exp2(-inf) = 0.
    const float offset = now == -INFINITY ? 0.f : now * scale;
    x[0] = fast_exp2(x[0] * scale - offset);
    x[1] = fast_exp2(x[1] * scale - offset);
    x[4] = fast_exp2(x[4] * scale - offset);
    x[5] = fast_exp2(x[5] * scale - offset);
    sum_[g][half] = sum_[g][half] * rescale + ((x[0] + x[1]) + (x[4] + x[5]));
    return grows;
  }

  // O += P V: of V the matrices are keys 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  __device__ __forceinline__ void accumulate(const uint32_t (&weights)[kRowGroups][4],
                                             uint32_t v_address) {
    const int key = lane_ % 16, column = lane_ / 16 * 8;
    const uint32_t from = v_address + (key * Traits::kStride + column) * sizeof(T);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[4];
      sm80::load_transposed(b, from + step * 16 * sizeof(T));
#pragma unroll
      for (int g = 0; g < kRowGroups; ++g) {
        sm80::multiply_add<T>(out_[g] + 8 * step, weights[g], b[0], b[1]);
        sm80::multiply_add<T>(out_[g] + 8 * step + 4, weights[g], b[2], b[3]);
      }
    }
  }

  const DecodeParams& params_;
  const CacheSlots& slots_;
  int sequence_, kv_head_, lane_;
  int first_ = 0, end_ = 0;   // chunks
  int next_ = 0, write_ = 0;  // the chunk to be fetched, and the stage that it goes to
  uint32_t q_address_;
  Seen (*seen_)[kChunk];
  Stage* stages_;
  uint32_t q_[Traits::kQInRegisters ? kRowGroups : 1][Traits::kQInRegisters ? kSteps : 1][4];
  float out_[kRowGroups][kOutputs] = {};
  // Of the unscaled scores so far, or a little less; and of this thread's columns.
  float maximum_[kRowGroups][2], sum_[kRowGroups][2] = {};
};

}  // namespace longgen::decode
