// What a block of Hopper's decode kernel reads besides the cache: its query and the new tokens.
#pragma once

#include "arch/sm80/global_load.cuh"
#include "decode/tile.cuh"
#include "decode/warp_rows.cuh"
#include "params.h"

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
  using Rows = decode::WarpRows<Traits>;
  static constexpr int kEach = (Rows::kKeyLoads + Traits::kWarps - 1) / Traits::kWarps;
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
      if (warp_ + i * Traits::kWarps < Rows::kKeyLoads)
        Rows::load_queries(params_, tile_, queries_[i], warp_ + i * Traits::kWarps);
    }
    if (has_new())
      sm80::load_16_bytes(reinterpret_cast<uint32_t*>(&new_token_),
                          new_piece(params_, tile_, Traits::kWarps - 1 - warp_, 0, lane_));
  }

  __device__ __forceinline__ void store(typename Traits::Inputs& shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (warp_ + i * Traits::kWarps >= Rows::kKeyLoads) continue;
#pragma unroll
      for (int octet = 0; octet < Traits::kOctets; ++octet) {
        const auto& q = queries_[i][octet];
        shared.queries[warp_ + i * Traits::kWarps][octet][lane_] = {q[0], q[1], q[2], q[3]};
      }
    }
    if (has_new()) shared.new_token[Traits::kWarps - 1 - warp_][lane_] = new_token_;
  }

 private:
  // The last warp has its key, the one before its value.
  __device__ __forceinline__ bool has_new() const {
    return params_.new_tokens.n > 0 && warp_ >= Traits::kWarps - 2 && lane_ < kPieces;
  }

  const DecodeParams& params_;
  const decode::Tile& tile_;
  const int warp_, lane_;
  typename Rows::Queries queries_[kEach];
  uint4 new_token_;
};

}  // namespace longgen::sm90
