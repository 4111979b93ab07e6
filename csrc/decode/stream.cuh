// A warp of the decode kernel: scores, online softmax and output of the tile's rows against the
// chunks of keys that are this warp's.
//
// Keys and values go from memory straight to the registers of the matrix instructions that take
// them; which of their indices stands for which element is free, and chosen so that a lane's 16
// bytes are its operands. S = Q K^T has queries as rows; O^T = V^T P^T has queries as columns, so
// that scores turn into its operand within a lane. A chunk's keys are asked for when those of the
// chunk before have been multiplied, and its values likewise.
#pragma once

#include "arch/pack.cuh"
#include "arch/sm80/global_load.cuh"
#include "arch/sm80/mma.cuh"
#include "attention/cache_slots.cuh"
#include "attention/softmax.cuh"
#include "decode/tile.cuh"
#include "decode/traits.cuh"
#include "params.h"

namespace longgen::decode {

// In all of these a lane is 4 * g + c.
template <typename Traits>
class WarpStream {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOctets = Traits::kOctets;
  static constexpr int kKeyLoads = kHeadDim / 32;        // of 16 bytes a lane, of a key
  static constexpr int kValueLoads = kHeadDim / 64;      // the same of a value,
  static constexpr bool kHalfLoad = kHeadDim % 64 != 0;  // and 8 bytes more
  static constexpr int kOutTiles = kHeadDim / 16;        // of 16 elements of the output
  // The widest rows leave registers for keys or values, not both, and for no Q.
  static constexpr bool kReadsAhead = kHeadDim <= 128;
  static constexpr float kLag = 8.f;  // see OnlineSoftmax

 public:
  // p0 is the position of the first query token; p_first and p_last bound those of the tile.
  __device__ WarpStream(const DecodeParams& params, const CacheSlots& slots, const Tile& tile,
                        int p0)
      : params_(params),
        slots_(slots),
        tile_(tile),
        lane_(threadIdx.x % 32),
        g_(lane_ / 4),
        c_(lane_ % 4) {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int row = 8 * octet + g_;
      maximum_[octet] = -INFINITY;
      p_[octet] = p0 + tile.token(params, min(row, tile.rows - 1));
    }
  }

  // Attends to the chunks first, first + kWarps, ... below end. The first round only asks for one:
  // one place in the code finds chunks, and the instructions of a short call are soon there.
  __device__ __forceinline__ void run(int first, int end) {
    bool has = false;  // a chunk to attend to
    for (int chunk = first;; chunk += Traits::kWarps) {
      const bool more = chunk < end;
      float s[2][4];
      if (has) {
        scores(s);
        if constexpr (!kReadsAhead) load_values();
      }
      const bool whole = whole_;
      const int position = position_, until = until_;
      if (more) {
        locate(chunk);
        if constexpr (kReadsAhead) load_keys();
      }
      if (has) {
        if (!whole) mask(s, position, until);
        attend(s);
      } else if constexpr (kReadsAhead) {
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i) load_queries(q_[i], i);
      }
      if (!more) return;
      kReadsAhead ? load_values() : load_keys();
      has = true;
    }
  }

  // After run: the output, not divided by the sum, and maximum and sum of each row.
  __device__ __forceinline__ void store(float* out, float* maximum, float* sum) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float total = quad_sum(sum_[octet]);
      if (c_ == 0) {
        maximum[8 * octet + g_] = maximum_[octet];
        sum[8 * octet + g_] = total;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * octet + 2 * c_ + e;
        if (row >= tile_.rows) continue;
#pragma unroll
        for (int t = 0; t < kOutTiles; ++t) {
          out[row * Traits::kOutStride + element(t)] = out_[octet][t][e];
          out[row * Traits::kOutStride + element(t + kOutTiles)] = out_[octet][t][e + 2];
        }
      }
    }
  }

 private:
  // Elements 32 i + 8 c and following of queries g (+ 8); zeros where there is none.
  __device__ __forceinline__ void load_queries(uint32_t (&q)[kOctets][4], int i) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int row = 8 * octet + g_;
      if (row < tile_.rows) {
        const T* const from = static_cast<const T*>(params_.q) +
                              tile_.sequence * params_.q_strides.batch +
                              tile_.token(params_, row) * params_.q_strides.seqlen +
                              tile_.head(params_, row) * params_.q_strides.head;
        sm80::load_16_bytes(q[octet], from + 32 * i + 8 * c_);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) q[octet][j] = 0;
      }
    }
  }

  // Which element of a value is the lane's number `i`.
  __device__ __forceinline__ int element(int i) const {
    return i < 8 * kValueLoads ? i / 8 * 64 + 8 * g_ + i % 8
                               : 64 * kValueLoads + 4 * g_ + i - 8 * kValueLoads;
  }

  // Finds the rows of a chunk.
  __device__ __forceinline__ void locate(int chunk) {
    const int slot = slots_.whole(chunk);
    row_ = slot < 0 ? -1 : offset(slot);
    whole_ = row_ >= 0;
    if (whole_) return;
    const CacheSlots::Token token = slots_.token(chunk, lane_ % kChunk);
    row_ = offset(token.slot);
    position_ = token.position;
    until_ = row_ < 0 ? -1 : token.until;
  }
  __device__ __forceinline__ int64_t offset(int slot) const {
    return slot_offset(params_.cache, tile_.sequence, tile_.kv_head, slot);
  }

  // Calls read(offset) with the offset of one of the chunk's rows, which may differ from lane to
  // lane, or skip() where no query sees it: what lies there never reaches the arithmetic.
  template <typename Read, typename Skip>
  __device__ __forceinline__ void at_row(int row, Read read, Skip skip) const {
    int64_t offset = row_ + row * params_.cache.strides.slot;
    if (!whole_) offset = __shfl_sync(0xffffffff, row_, row);
    if (offset >= 0) {
      read(offset);
    } else {
      skip();
    }
  }

  // Keys g and g + 8.
  __device__ __forceinline__ void load_keys() {
    const T* const k = static_cast<const T*>(params_.cache.k) + 8 * c_;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      at_row(
          g_ + 8 * j,
          [&](int64_t row) {
#pragma unroll
            for (int i = 0; i < kKeyLoads; ++i) sm80::load_16_bytes(keys_[j][i], k + row + 32 * i);
          },
          [&] {
#pragma unroll
            for (int i = 0; i < 4 * kKeyLoads; ++i) keys_[j][i / 4][i % 4] = 0;
          });
    }
  }

  // Values 2 c + {0, 1, 8, 9}.
  __device__ __forceinline__ void load_values() {
    const T* const v = static_cast<const T*>(params_.cache.v);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      at_row(
          2 * c_ + j % 2 + j / 2 * 8,
          [&](int64_t row) {
#pragma unroll
            for (int i = 0; i < kValueLoads; ++i)
              sm80::load_16_bytes(values_[j] + 4 * i, v + row + element(8 * i));
            if constexpr (kHalfLoad)
              sm80::load_8_bytes(values_[j] + 4 * kValueLoads, v + row + element(8 * kValueLoads));
          },
          [&] {
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) values_[j][i] = 0;
          });
    }
  }

  // S = Q K^T. s[j][0] and [1] are query g and keys 8 j + 2 c + {0, 1}, [2] and [3] query g + 8.
  __device__ __forceinline__ void scores(float (&s)[2][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) s[j][r] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      auto& q = q_[kReadsAhead ? i : 0];
      if constexpr (!kReadsAhead) load_queries(q, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int lo = 2 * half, hi = 2 * half + 1;
        const uint32_t a[4] = {q[0][lo], kOctets == 1 ? 0 : q[kOctets - 1][lo], q[0][hi],
                               kOctets == 1 ? 0 : q[kOctets - 1][hi]};
#pragma unroll
        for (int j = 0; j < 2; ++j)
          sm80::multiply_add<T>(s[j], a, keys_[j][i][lo], keys_[j][i][hi]);
      }
    }
  }

  // Of a row that does not see a key the score becomes -inf. Lane r has row r's visibility.
  __device__ __forceinline__ void mask(float (&s)[2][4], int position, int until) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = 8 * j + 2 * c_ + e;
        const int from = __shfl_sync(0xffffffff, position, key);
        const int last = __shfl_sync(0xffffffff, until, key);
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
          const bool sees = (from <= p_[octet]) & (p_[octet] <= last);
          s[j][2 * octet + e] = sees ? s[j][2 * octet + e] : -INFINITY;
        }
      }
    }
  }

  // Softmax and O^T += V^T P^T.
  __device__ __forceinline__ void attend(float (&s)[2][4]) {
    uint32_t weights[kOctets][2];
    float rescale[kOctets];
    bool grown = false;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      grown |= soften(s, octet, rescale[octet]);
#pragma unroll
      for (int j = 0; j < 2; ++j) weights[octet][j] = pack<T>(s[j][2 * octet], s[j][2 * octet + 1]);
    }
    if (__any_sync(0xffffffff, grown)) {
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float factor = __shfl_sync(0xffffffff, rescale[octet], 8 * c_ + 4 * e);
#pragma unroll
          for (int t = 0; t < kOutTiles; ++t) {
            out_[octet][t][e] *= factor;
            out_[octet][t][e + 2] *= factor;
          }
        }
      }
    }
    accumulate(weights);
  }

  // Turns one row's scores into weights relative to a maximum that may lag (OnlineSoftmax says
  // why); returns whether it moved, and what earlier outputs are then multiplied by.
  __device__ __forceinline__ bool soften(float (&s)[2][4], int octet, float& rescale) {
    float* const x = s[0] + 2 * octet;
    float* const y = s[1] + 2 * octet;
    const float scale = params_.scale_log2;
    const float largest = quad_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(y[0], y[1])));
    float& maximum = maximum_[octet];
    const bool grows = (largest - maximum) * scale > kLag;  // -inf minus -inf is NaN: no
    const float now = grows ? largest : maximum;
    rescale = grows ? fast_exp2((maximum - now) * scale) : 1.f;
    maximum = now;
    // A row that has seen nothing keeps -inf; 0 in its place makes its weights exp2(-inf) = 0.
    const float reference = now == -INFINITY ? 0.f : now * scale;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      x[e] = fast_exp2(x[e] * scale - reference);
      y[e] = fast_exp2(y[e] * scale - reference);
    }
    sum_[octet] = sum_[octet] * rescale + ((x[0] + x[1]) + (y[0] + y[1]));
    return grows;
  }

  // The lane's element `i` of values 2 c and 2 c + 1, or of those 8 further, as an operand.
  __device__ __forceinline__ uint32_t value_pair(int i, int further) const {
    return __byte_perm(values_[2 * further][i / 2], values_[2 * further + 1][i / 2],
                       i % 2 == 0 ? 0x5410 : 0x7632);
  }

  // O^T += V^T P^T: out_[.][t][0] and [1] are element t of the lane's and queries 2 c + {0, 1},
  // [2] and [3] element t + kOutTiles.
  __device__ __forceinline__ void accumulate(const uint32_t (&weights)[kOctets][2]) {
#pragma unroll
    for (int t = 0; t < kOutTiles; ++t) {
      const uint32_t a[4] = {value_pair(t, 0), value_pair(t + kOutTiles, 0), value_pair(t, 1),
                             value_pair(t + kOutTiles, 1)};
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        sm80::multiply_add<T>(out_[octet][t], a, weights[octet][0], weights[octet][1]);
    }
  }

  const DecodeParams& params_;
  const CacheSlots& slots_;
  const Tile& tile_;
  const int lane_, g_, c_;
  int p_[kOctets];  // positions of queries g (+ 8)
  // The chunk that is read next. Whole, all see all of it and `row_` is the offset of its first
  // row, in elements; otherwise that of row lane % 16, or -1, which queries at position_ to until_
  // see.
  bool whole_ = false;
  int64_t row_ = -1;
  int position_ = 0, until_ = -1;
  uint32_t q_[kReadsAhead ? kKeyLoads : 1][kOctets][4];
  uint32_t keys_[2][kKeyLoads][4];
  uint32_t values_[4][kHeadDim / 16];
  float out_[kOctets][kOutTiles][4] = {};
  // Of queries g (+ 8): of the unscaled scores so far, or a little less; and of this lane's keys.
  float maximum_[kOctets], sum_[kOctets] = {};
};

}  // namespace longgen::decode
