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
// They are asked for before the chunks, behind which they would wait for microseconds, by as many
// warps as possible, so that none asks for its chunks before another has asked for these; where
// they lie is found before that.
template <typename Traits, int kLoaders>
class Inputs {
  using T = typename Traits::T;
  // Of an octet's rows, four lanes have 64 bytes each.
  static constexpr int kLoads = WarpRows<Traits>::kQueryLoads * Traits::kOctets;
  static constexpr int kEach = (kLoads + kLoaders - 1) / kLoaders;
  static constexpr int kPieces = Traits::kHeadDim / 8;

 public:
  __device__ Inputs(const DecodeParams& params, const decode::Tile& tile, int loader)
      : params_(params), loader_(loader), lane_(threadIdx.x % 32) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = 8 * octet(i) + lane_ / 4;
      has_query_[i] = load(i) < kLoads && row < tile.rows;
      query_[i] = static_cast<const T*>(params_.q) + tile.sequence * params_.q_strides.batch;
      if (has_query_[i])
        query_[i] += tile.token(params_, row) * params_.q_strides.seqlen +
                     tile.head(params_, row) * params_.q_strides.head +
                     Traits::query_element(load(i) / Traits::kOctets, lane_ % 4);
    }
    if (has_new()) new_ = new_piece(params_, tile, new_half(), 0, lane_);
  }

  // Zeros where there is no query. Each thread has then to wait for its copies.
  __device__ __forceinline__ void load(typename Traits::Inputs& shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (load(i) >= kLoads) continue;
      uint4* const to = shared.queries[load(i) / Traits::kOctets][octet(i)];
      if constexpr (Traits::kBytes == 1) {
        copy_16_bytes(shared_address(to + lane_), query_[i], has_query_[i]);
      } else {  // each two elements to the lane that multiplies them
#pragma unroll
        for (int k = 0; k < 4; ++k)
          copy_4_bytes(shared_address(to + lane_ / 4 * 4 + k) + lane_ % 4 * 4, query_[i] + 2 * k,
                       has_query_[i]);
      }
    }
    if (has_new()) copy_16_bytes(shared_address(&shared.new_token[new_half()][lane_]), new_, true);
  }

 private:
  // This warp's i-th: 64 bytes of which rows.
  __device__ __forceinline__ int load(int i) const { return loader_ + i * kLoaders; }
  __device__ __forceinline__ int octet(int i) const { return load(i) % Traits::kOctets; }
  // The last warp has the new token's key, the one before its value.
  __device__ __forceinline__ int new_half() const { return kLoaders - 1 - loader_; }
  __device__ __forceinline__ bool has_new() const {
    return params_.new_tokens.n > 0 && new_half() < 2 && lane_ < kPieces;
  }

  const DecodeParams& params_;
  const int loader_, lane_;
  const T* query_[kEach];
  bool has_query_[kEach];
  const uint4* new_;
};

}  // namespace longgen::sm90
