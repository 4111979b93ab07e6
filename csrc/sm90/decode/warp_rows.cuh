// A warp's rows of the query, on Hopper: scores, online softmax and output against one 32 keys in
// shared memory after another.
//
// S^T = K Q^T has keys as rows, O^T = V^T P^T elements. Both have queries as columns, so that a
// lane has the same two throughout, with what belongs to them, and all rows of the matrix
// instructions are used. P^T as an operand is S^T with its 8 x 8 blocks transposed.
#pragma once

#include "arch/pack.cuh"
#include "arch/sm80/mma.cuh"
#include "arch/sm90/shared_copy.cuh"
#include "attention/softmax.cuh"
#include "decode/fp8.cuh"
#include "decode/tile.cuh"
#include "params.h"

namespace longgen::sm90 {

// In all of these a lane is 4 * g + c, and has queries 2 c + {0, 1} of each octet.
template <typename Traits>
class WarpRows {
  using T = typename Traits::T;
  using Factors = typename Traits::Factors;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOctets = Traits::kOctets;
  static constexpr int kKeyTiles = Traits::kChunks;  // of 16 keys
  static constexpr int kOutTiles = kHeadDim / 16;    // of 16 elements
  static constexpr unsigned kAll = 0xffffffff;

 public:
  static constexpr int kQueryLoads = kHeadDim / 32;  // of 16 bytes a lane
  // [m][e] and [m][2 + e]: keys 16 m + g and 16 m + g + 8, query 2 c + e.
  using Scores = float[kOctets][kKeyTiles][4];

  // p0 is the position of the first query token.
  __device__ WarpRows(const DecodeParams& params, const decode::Tile& tile, const Factors& factors,
                      int p0)
      : params_(params),
        tile_(tile),
        p0_(p0),
        scale_(factors.scores(params)),
        lane_(threadIdx.x % 32),
        g_(lane_ / 4),
        c_(lane_ % 4) {
    each_query([&](int octet, int e) { reference_[octet][e] = OnlineSoftmax::kNoReference; });
  }

  // S^T = K Q^T.
  __device__ __forceinline__ void score(Scores& s, uint32_t keys_at,
                                        const typename Traits::Inputs& inputs) const {
    // Two octets are enough instructions that do not depend on each other. One has sums of their
    // own for every other.
    constexpr bool kTwice = kOctets == 1;
    Scores rest = {};
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4 * kKeyTiles; ++i) s[octet][i / 4][i % 4] = 0.f;
    }
    Converted converted;
#pragma unroll
    for (int i = 0; i < kQueryLoads; ++i) {
      uint32_t q[kOctets][4];
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
        load_shared_16_bytes(q[octet], shared_address(&inputs.queries[i][octet][lane_]));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          uint32_t keys[4];
          load_keys(keys, converted, keys_at, m, i, half);
#pragma unroll
          for (int octet = 0; octet < kOctets; ++octet)
            sm80::multiply_add<T>(half == 1 && kTwice ? rest[octet][m] : s[octet][m], keys,
                                  q[octet][2 * half], q[octet][2 * half + 1]);
        }
      }
    }
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 4 * kKeyTiles; ++i) {
        if (kTwice) s[octet][i / 4][i % 4] += rest[octet][i / 4][i % 4];
      }
    }
  }

  // Of a query that does not see a key the score becomes -inf. Lane r has which positions see key
  // r: `position` to `until`.
  __device__ __forceinline__ void mask(Scores& s, int position, int until) const {
    int p[kOctets][2];  // queries' positions
    each_query([&](int octet, int e) {
      p[octet][e] = p0_ + tile_.token(params_, min(row(octet, e), tile_.rows - 1));
    });
#pragma unroll
    for (int block = 0; block < 2 * kKeyTiles; ++block) {
      const int from = __shfl_sync(kAll, position, 8 * block + g_);
      const int last = __shfl_sync(kAll, until, 8 * block + g_);
      each_query([&](int octet, int e) {
        const bool sees = (from <= p[octet][e]) & (p[octet][e] <= last);
        float& x = s[octet][block / 2][block % 2 * 2 + e];
        x = sees ? x : -INFINITY;
      });
    }
  }

  // Softmax and O^T += V^T P^T.
  __device__ __forceinline__ void attend(Scores& s, uint32_t values_at) {
    weigh(s);
    uint32_t weights[kOctets][2 * kKeyTiles];
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
      for (int block = 0; block < 2 * kKeyTiles; ++block) {
        const float* const x = s[octet][block / 2] + block % 2 * 2;
        weights[octet][block] = sm80::transposed(pack<T>(x[0], x[1]));
      }
    }
#pragma unroll
    for (int m = 0; m < kKeyTiles; ++m) {
      Converted converted;
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        uint32_t values[4];
        load_values(values, converted, values_at, m, t);
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet)
          sm80::multiply_add<T>(out_[octet][t], values, weights[octet][2 * m],
                                weights[octet][2 * m + 1]);
      }
    }
  }

  // The output, not divided by the sum, and offset and sum of each row; of rows that the tile does
  // not have too, so that nothing branches.
  template <typename Found>
  __device__ __forceinline__ void store(Found& found) const {
    float total[kOctets][2];
    each_query([&](int octet, int e) { total[octet][e] = column_sum(sum_[octet][e]); });
    if (g_ == 0) {
      each_query([&](int octet, int e) {
        const float reference = reference_[octet][e];
        found.offset[row(octet, e)] =
            reference == OnlineSoftmax::kNoReference ? -INFINITY : reference;
        found.sum[row(octet, e)] = total[octet][e];
      });
    }
    each_query([&](int octet, int e) {
      float* const out = found.out + row(octet, e) * Found::kStride;
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        out[element(t, 0)] = out_[octet][t][e];
        out[element(t, 1)] = out_[octet][t][2 + e];
      }
    });
  }

 private:
  // What an operand is made of where the cache is not of T: see load_keys and load_values.
  using Converted = uint32_t[Traits::kBytes == 1 ? 8 : 1][4];

  template <typename F>
  static __device__ __forceinline__ void each_query(F f) {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
      f(octet, 0);
      f(octet, 1);
    }
  }
  __device__ __forceinline__ int row(int octet, int e) const { return 8 * octet + 2 * c_ + e; }

  // Which element of the output is in row g of a tile, or 8 below. Eight neighbours of an e4m3
  // value are a lane's.
  __device__ __forceinline__ int element(int tile, int below) const {
    return Traits::kBytes == 1 ? 64 * (tile / 4) + 8 * g_ + tile % 4 + 4 * below
                               : 16 * tile + 8 * below + g_;
  }

  // Keys 16 m + {0, ..., 15}, and the 16 elements that a half of queries' load `i` has. 16 bytes of
  // an e4m3 key are those of two loads, of which the first reads.
  __device__ __forceinline__ void load_keys(uint32_t (&keys)[4], Converted& converted, uint32_t at,
                                            int m, int i, int half) const {
    if constexpr (Traits::kBytes == 2) {
      load_matrices(
          keys, at + Traits::swizzled(16 * m + lane_ % 16, 32 * i + 16 * half + lane_ / 16 * 8));
    } else {
      const auto of = [&](int load, int block) -> uint32_t (&)[4] {
        return converted[4 * (load % 2) + block];
      };
      if (i % 2 == 0 && half == 0) {
#pragma unroll
        for (int block = 2 * m; block < 2 * m + 2; ++block) {
          uint32_t x[4];
          load_shared_16_bytes(x,
                               at + Traits::swizzled(8 * block + g_, Traits::query_element(i, c_)));
          decode::from_fp8<T>(of(0, block), x[0], x[1]);
          decode::from_fp8<T>(of(1, block), x[2], x[3]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) keys[k] = of(i, 2 * m + k % 2)[2 * half + k / 2];
    }
  }

  // Values 16 m + {0, ..., 15}, transposed: their elements of a tile. Of e4m3 values a lane reads
  // those of four tiles at once, for the first.
  __device__ __forceinline__ void load_values(uint32_t (&values)[4], Converted& converted,
                                              uint32_t at, int m, int tile) const {
    if constexpr (Traits::kBytes == 2) {
      load_transposed(values, at + Traits::swizzled(16 * m + lane_ / 16 * 8 + lane_ % 8,
                                                    16 * tile + lane_ / 8 % 2 * 8));
    } else {
      if (tile % 4 == 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t x[2];
          load_shared_8_bytes(x, at + Traits::swizzled(16 * m + 2 * c_ + j % 2 + j / 2 * 8,
                                                       64 * (tile / 4) + 8 * g_));
          decode::from_fp8<T>(converted[j], x[0], x[1]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // one element of two neighbouring values
        const int i = tile % 4 + k % 2 * 4, further = k / 2 * 2;
        values[k] = __byte_perm(converted[further][i / 2], converted[further + 1][i / 2],
                                i % 2 == 0 ? 0x5410 : 0x7632);
      }
    }
  }

  // Turns scores into weights relative to a maximum that may lag (OnlineSoftmax says why).
  __device__ __forceinline__ void weigh(Scores& s) {
    float largest[kOctets][2];
    bool grows = false;
    each_query([&](int octet, int e) {
      float& x = largest[octet][e];
      x = fmaxf(s[octet][0][e], s[octet][0][2 + e]);
#pragma unroll
      for (int m = 1; m < kKeyTiles; ++m) x = fmaxf(x, fmaxf(s[octet][m][e], s[octet][m][2 + e]));
      grows |= grown(octet, e, x);
    });
    if (__any_sync(kAll, grows)) refer(largest);
    each_query([&](int octet, int e) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < 2 * kKeyTiles; ++i) {
        float& x = s[octet][i / 2][i % 2 * 2 + e];
        x = fast_exp2(x * scale_ - reference_[octet][e]);
        sum += x;
      }
      sum_[octet][e] += sum;
    });
  }

  __device__ __forceinline__ bool grown(int octet, int e, float largest) const {
    return largest * scale_ - reference_[octet][e] > OnlineSoftmax::kLag;
  }

  // Makes the scores' maxima the reference where those have grown. Where a query has seen nothing,
  // its weights are exp2(-inf) = 0.
  __device__ __forceinline__ void refer(const float (&largest)[kOctets][2]) {
    each_query([&](int octet, int e) {
      const float now = column_max(largest[octet][e]);
      if (!grown(octet, e, now)) return;
      const float rescale = fast_exp2(reference_[octet][e] - now * scale_);
      reference_[octet][e] = now * scale_;
      sum_[octet][e] *= rescale;
#pragma unroll
      for (int t = 0; t < kOutTiles; ++t) {
        out_[octet][t][e] *= rescale;
        out_[octet][t][2 + e] *= rescale;
      }
    });
  }

  // Over the eight lanes that share a column.
  static __device__ __forceinline__ float column_max(float x) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, other));
    return x;
  }
  static __device__ __forceinline__ float column_sum(float x) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) x += __shfl_xor_sync(kAll, x, other);
    return x;
  }

  const DecodeParams& params_;
  const decode::Tile& tile_;
  const int p0_;       // the first query token's position
  const float scale_;  // of scores, for weights to base 2
  const int lane_, g_, c_;
  float out_[kOctets][kOutTiles][4] = {};  // as scores
  // Maxima of scaled scores so far, or a little less; sums of weights, of this lane's keys.
  float reference_[kOctets][2], sum_[kOctets][2] = {};
};

}  // namespace longgen::sm90
