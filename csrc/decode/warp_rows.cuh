// A warp's rows of the query: scores, online softmax and output against one chunk of keys in
// registers after another.
//
// Which of the matrix instructions' indices stands for which element is free, and chosen so that
// the 16 bytes that a lane reads at once are its operands. S = Q K^T has queries as rows;
// O^T = V^T P^T has queries as columns, so that scores turn into its operand within a lane.
#pragma once

#include "arch/pack.cuh"
#include "arch/sm80/global_load.cuh"
#include "arch/sm80/mma.cuh"
#include "attention/softmax.cuh"
#include "decode/tile.cuh"
#include "params.h"

namespace longgen::decode {

// In all of these a lane is 4 * g + c. Traits::key_element(i, c) is the first of the 8 elements of
// a key, and of a query, that a lane reads with its load `i`.
template <typename Traits>
class WarpRows {
  using T = typename Traits::T;
  using Factors = typename Traits::Factors;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOctets = Traits::kOctets;
  static constexpr int kKeyTiles = 2;              // of 8 keys, a chunk
  static constexpr int kOutTiles = kHeadDim / 16;  // of 16 elements of the output
  static constexpr float kLag = 8.f;               // see OnlineSoftmax

 public:
  static constexpr int kKeyLoads = kHeadDim / 32;        // of 16 bytes a lane, of a key
  static constexpr int kValueLoads = kHeadDim / 64;      // the same of a value,
  static constexpr bool kHalfLoad = kHeadDim % 64 != 0;  // and a last one of 8 bytes
  using Queries = uint32_t[kOctets][4];                  // a load's, of queries g (+ 8)
  using Keys = uint32_t[kKeyTiles][4];                   // a load's, of keys g, g + 8, ...
  using Values = uint32_t[4][4];                         // a load's, of values 2 c + {0, 1, 8, 9}
  // [j][0] and [1]: query g and keys 8 j + 2 c + {0, 1}, then query g + 8.
  using Scores = float[kKeyTiles][4];

  // p0 is the position of the first query token.
  __device__ WarpRows(const DecodeParams& params, const Tile& tile, const Factors& factors, int p0)
      : params_(params),
        tile_(tile),
        factors_(factors),
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

  // Zeros where there is no query.
  static __device__ __forceinline__ void load_queries(const DecodeParams& params, const Tile& tile,
                                                      Queries& q, int i) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const int row = 8 * octet + lane / 4;
      if (row < tile.rows) {
        const T* const from = static_cast<const T*>(params.q) +
                              tile.sequence * params.q_strides.batch +
                              tile.token(params, row) * params.q_strides.seqlen +
                              tile.head(params, row) * params.q_strides.head;
        sm80::load_16_bytes(q[octet], from + Traits::key_element(i, lane % 4));
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) q[octet][j] = 0;
      }
    }
  }

  // Which element of a value is the first of those that the lane reads with its load `i`.
  __device__ __forceinline__ int value_element(int i) const {
    return i < kValueLoads ? 64 * i + 8 * g_ : 64 * kValueLoads + 4 * g_;
  }

  // S = Q K^T; `keys_of(i)` and `queries(i)` are those of load `i`.
  template <typename KeysOf, typename QueriesOf>
  __device__ __forceinline__ void score(Scores& s, KeysOf keys_of, QueriesOf queries) const {
    Scores rest = {};  // sums of their own: half as long a chain of dependent instructions
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) s[j][r] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const Keys& keys = keys_of(i);
      const Queries& q = queries(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int lo = 2 * half, hi = 2 * half + 1;
        const uint32_t a[4] = {q[0][lo], kOctets == 1 ? 0 : q[kOctets - 1][lo], q[0][hi],
                               kOctets == 1 ? 0 : q[kOctets - 1][hi]};
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
          sm80::multiply_add<T>(half == 0 ? s[j] : rest[j], a, keys[j][lo], keys[j][hi]);
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int r = 0; r < 2 * kOctets; ++r) s[j][r] += rest[j][r];
    }
  }

  // Of a row that does not see a key the score becomes -inf. Lane r has which queries see row r of
  // the keys: those at `position` to `until`.
  __device__ __forceinline__ void mask(Scores& s, int position, int until) const {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
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

  // Softmax and O^T += V^T P^T; `values(i)` is those of load `i`.
  template <typename OfLoad>
  __device__ __forceinline__ void attend(Scores& s, OfLoad values) {
    uint32_t weights[kOctets][kKeyTiles];
    float rescale[kOctets];
    bool grown = false;
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      grown |= soften(s, octet, rescale[octet]);
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
        weights[octet][j] = pack<T>(s[j][2 * octet], s[j][2 * octet + 1]);
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
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i) accumulate<8>(4 * i, weights, values(i));
    if constexpr (kHalfLoad) accumulate<4>(4 * kValueLoads, weights, values(kValueLoads));
  }

  // The output, not divided by the sum, and offset and sum of each row.
  template <typename Found>
  __device__ __forceinline__ void store(Found& found) const {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      const float total = quad_sum(sum_[octet]);
      if (c_ == 0) {
        found.offset[8 * octet + g_] = maximum_[octet] * factors_.scores(params_);
        found.sum[8 * octet + g_] = total;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * octet + 2 * c_ + e;
        if (row >= tile_.rows) continue;
        float* const out = found.out + row * Found::kStride;
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {  // four neighbours
          // Half a load's elements, each of a tile of its own; or of the last, shorter load, all.
          constexpr int kFull = 2 * kValueLoads;
          const int tile = i < kFull ? i / 2 * 4 : 4 * kValueLoads;
          float x[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            x[j] = i < kFull ? out_[octet][tile + j][e + i % 2 * 2]
                             : out_[octet][tile + j % 2][e + j / 2 * 2];
          float* const at = out + value_element(i / 2) + (i < kFull ? i % 2 * 4 : 0);
          *reinterpret_cast<float4*>(at) = {x[0], x[1], x[2], x[3]};
        }
      }
    }
  }

 private:
  // Turns one row's scores into weights relative to a maximum that may lag (OnlineSoftmax says
  // why); returns whether it moved, and what earlier outputs are then multiplied by.
  __device__ __forceinline__ bool soften(Scores& s, int octet, float& rescale) {
    const float scale = factors_.scores(params_);
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
      largest = fmaxf(largest, fmaxf(s[j][2 * octet], s[j][2 * octet + 1]));
    largest = quad_max(largest);
    float& maximum = maximum_[octet];
    const bool grows = (largest - maximum) * scale > kLag;  // -inf minus -inf is NaN: no
    const float now = grows ? largest : maximum;
    rescale = grows ? fast_exp2((maximum - now) * scale) : 1.f;
    maximum = now;
    // A row that has seen nothing keeps -inf; 0 in its place makes its weights exp2(-inf) = 0.
    const float reference = now == -INFINITY ? 0.f : now * scale;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[j][2 * octet + e];
        x = fast_exp2(x * scale - reference);
        sum += x;
      }
    }
    sum_[octet] = sum_[octet] * rescale + sum;
    return grows;
  }

  // O^T += V^T P^T for a load's kElements elements: of tile first + t rows g are its
  // element t, and rows g + 8 the element half a load further.
  template <int kElements>
  __device__ __forceinline__ void accumulate(int first,
                                             const uint32_t (&weights)[kOctets][kKeyTiles],
                                             const Values& values) {
    // Element `i` of values 2 c and 2 c + 1, or of those 8 further, as an operand.
    const auto pair = [&](int i, int further) {
      return __byte_perm(values[2 * further][i / 2], values[2 * further + 1][i / 2],
                         i % 2 == 0 ? 0x5410 : 0x7632);
    };
    constexpr int kTiles = kElements / 2;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint32_t a[4] = {pair(t, 0), pair(t + kTiles, 0), pair(t, 1), pair(t + kTiles, 1)};
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        sm80::multiply_add<T>(out_[octet][first + t], a, weights[octet][0], weights[octet][1]);
    }
  }

  const DecodeParams& params_;
  const Tile& tile_;
  const Factors factors_;
  const int lane_, g_, c_;
  int p_[kOctets];  // positions of queries g (+ 8)
  // Of each tile: queries 2 c + {0, 1} of an element of this lane's, and of another; see
  // accumulate.
  float out_[kOctets][kOutTiles][4] = {};
  // Of queries g (+ 8): of the unscaled scores so far, or a little less; and of this lane's keys.
  float maximum_[kOctets], sum_[kOctets] = {};
};

}  // namespace longgen::decode
