// What a block of Hopper's decode kernel reads besides the cache: its query and the new tokens.
#pragma once

#include "arch/sm90/shared_copy.cuh"
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

// A tile's query and first new token on their way to shared memory, which kLoaders warps bring.
// They are asked for before the chunks, behind which they would wait for microseconds; where they
// lie is found before that.
template <typename Traits, int kLoaders>
class Inputs {
  using T = typename Traits::T;
  static constexpr int kLoads = WarpRows<Traits>::kQueryLoads;
  static constexpr int kEach = (kLoads + kLoaders - 1) / kLoaders;
  static constexpr int kPieces = Traits::kHeadDim / 8;

 public:
  __device__ Inputs(const DecodeParams& params, const decode::Tile& tile, int loader)
      : params_(params), loader_(loader), lane_(threadIdx.x % 32) {
#pragma unroll
    for (int octet = 0; octet < Traits::kOctets; ++octet) {
      const int row = 8 * octet + lane_ / 4;
      has_query_[octet] = row < tile.rows;
      query_[octet] = static_cast<const T*>(params_.q) + tile.sequence * params_.q_strides.batch;
      if (has_query_[octet])
        query_[octet] += tile.token(params_, row) * params_.q_strides.seqlen +
                         tile.head(params_, row) * params_.q_strides.head;
    }
    if (has_new()) new_ = new_piece(params_, tile, new_half(), 0, lane_);
  }

  // Zeros where there is no query. Each thread has then to wait for its copies.
  __device__ __forceinline__ void load(typename Traits::Inputs& shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int load = loader_ + i * kLoaders;
      if (load >= kLoads) continue;
#pragma unroll
      for (int octet = 0; octet < Traits::kOctets; ++octet) {
        const T* const from = query_[octet] + Traits::query_element(load, lane_ % 4);
        uint4* const to = shared.queries[load][octet];
        if constexpr (Traits::kBytes == 1) {
          copy_16_bytes(shared_address(to + lane_), from, has_query_[octet]);
        } else {  // each two elements to the lane that multiplies them
#pragma unroll
          for (int k = 0; k < 4; ++k)
            copy_4_bytes(shared_address(to + lane_ / 4 * 4 + k) + lane_ % 4 * 4, from + 2 * k,
                         has_query_[octet]);
        }
      }
    }
    if (has_new()) copy_16_bytes(shared_address(&shared.new_token[new_half()][lane_]), new_, true);
  }

 private:
  // The last warp has the new token's key, the one before its value.
  __device__ __forceinline__ int new_half() const { return kLoaders - 1 - loader_; }
  __device__ __forceinline__ bool has_new() const {
    return params_.new_tokens.n > 0 && new_half() < 2 && lane_ < kPieces;
  }

  const DecodeParams& params_;
  const int loader_, lane_;
  const T* query_[Traits::kOctets];
  bool has_query_[Traits::kOctets];
  const uint4* new_;
};

}  // namespace longgen::sm90
