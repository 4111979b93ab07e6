// What a block of Hopper's decode kernel reads besides the cache: its query and the new tokens.
#pragma once

#include "arch/sm80/global_load.cuh"
#include "decode/tile.cuh"
#include "params.h"
#include "sm90/decode/warp_rows.cuh"

namespace longgen::sm90 {

// A piece of 16 bytes of the key (half 0) or value of a new token.
__device__ __forceinline__ const uint4* new_piece(const DecodeParams& params,
                                                  const decode::Tile& tile, int half, int token,
                                                  int piece) {
  const NewTokensParams& tokens = params.new_tokens;
  const int64_t offset = tile.sequence * tokens.strides.batch + token * tokens.strides.seqlen +
                         tile.kv_head * tokens.strides.head + 8 * piece;
  return reinterpret_cast<const uint4*>(
      static_cast<const uint16_t*>(half == 0 ? tokens.k : tokens.v) + offset);
}

// The block's query and first new token on their way to shared memory. They are asked for before
// the chunks, behind which they would wait for microseconds.
template <typename Traits>
class Inputs {
  static constexpr int kLoads = WarpRows<Traits>::kQueryLoads;
  static constexpr int kEach = (kLoads + Traits::kWarps - 1) / Traits::kWarps;
  static constexpr int kPieces = Traits::kHeadDim / 8;

 public:
  __device__ Inputs(const DecodeParams& params, const decode::Tile& tile)
      : params_(params),
        tile_(tile),
        warp_(decode::uniform(threadIdx.x / 32)),
        lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (warp_ + i * Traits::kWarps < kLoads) load_queries(i, warp_ + i * Traits::kWarps);
    }
    if (has_new())
      sm80::load_16_bytes(reinterpret_cast<uint32_t*>(&new_token_),
                          new_piece(params_, tile_, Traits::kWarps - 1 - warp_, 0, lane_));
  }

  __device__ __forceinline__ void store(typename Traits::Inputs& shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (warp_ + i * Traits::kWarps >= kLoads) continue;
#pragma unroll
      for (int octet = 0; octet < Traits::kOctets; ++octet) {
        const auto& q = queries_[i][octet];
        uint4* const to = shared.queries[warp_ + i * Traits::kWarps][octet];
        if constexpr (Traits::kBytes == 1) {
          to[lane_] = {q[0], q[1], q[2], q[3]};
        } else {  // each two elements to the lane that multiplies them
#pragma unroll
          for (int k = 0; k < 4; ++k)
            reinterpret_cast<uint32_t*>(to + lane_ / 4 * 4 + k)[lane_ % 4] = q[k];
        }
      }
    }
    if (has_new()) shared.new_token[Traits::kWarps - 1 - warp_][lane_] = new_token_;
  }

 private:
  // The last warp has its key, the one before its value.
  __device__ __forceinline__ bool has_new() const {
    return params_.new_tokens.n > 0 && warp_ >= Traits::kWarps - 2 && lane_ < kPieces;
  }

  // Zeros where there is no query.
  __device__ __forceinline__ void load_queries(int i, int load) {
#pragma unroll
    for (int octet = 0; octet < Traits::kOctets; ++octet) {
      const int row = 8 * octet + lane_ / 4;
      uint32_t (&q)[4] = queries_[i][octet];
      if (row < tile_.rows) {
        const auto* const from = static_cast<const typename Traits::T*>(params_.q) +
                                 tile_.sequence * params_.q_strides.batch +
                                 tile_.token(params_, row) * params_.q_strides.seqlen +
                                 tile_.head(params_, row) * params_.q_strides.head;
        sm80::load_16_bytes(q, from + Traits::query_element(load, lane_ % 4));
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) q[k] = 0;
      }
    }
  }

  const DecodeParams& params_;
  const decode::Tile& tile_;
  const int warp_, lane_;
  uint32_t queries_[kEach][Traits::kOctets][4];
  uint4 new_token_;
};

}  // namespace longgen::sm90
