// A warp's keys and values from memory straight to its registers, on every architecture.
//
// There is no shared memory in the loop. A chunk's keys are asked for when those of the chunk
// before have been multiplied, and its values likewise.
#pragma once

#include "attention/cache_slots.cuh"
#include "decode/warp_rows.cuh"

namespace longgen::decode {

template <typename Traits>
class WarpStream {
  using T = typename Traits::T;
  using Rows = WarpRows<Traits>;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kKeyLoads = Rows::kKeyLoads;
  static constexpr int kValueLoads = Rows::kValueLoads + (Rows::kHalfLoad ? 1 : 0);
  // The widest rows leave registers for keys or values, not both, and for no Q.
  static constexpr bool kReadsAhead = kHeadDim <= 128;

 public:
  __device__ WarpStream(const DecodeParams& params, const CacheSlots& slots, const Tile& tile,
                        Rows& rows)
      : params_(params), slots_(slots), tile_(tile), rows_(rows), lane_(threadIdx.x % 32) {}

  // Attends to the chunks first, first + kWarps, ... below end. The first round only asks for one:
  // one place in the code finds chunks, and the instructions of a short call are soon there.
  __device__ __forceinline__ void run(int first, int end) {
    bool has = false;  // a chunk to attend to
    for (int chunk = first;; chunk += Traits::kWarps) {
      const bool more = chunk < end;
      typename Rows::Scores s;
      if (has) {
        rows_.score(
            s, [&](int i) -> const typename Rows::Keys& { return keys_[i]; },
            [&](int i) -> const typename Rows::Queries& {
              if constexpr (!kReadsAhead) Rows::load_queries(params_, tile_, q_[0], i);
              return q_[kReadsAhead ? i : 0];
            });
        if constexpr (!kReadsAhead) load_values();
      }
      const bool whole = whole_;
      const int position = position_, until = until_;
      if (more) {
        locate(chunk);
        if constexpr (kReadsAhead) load_keys();
      }
      if (has) {
        if (!whole) rows_.mask(s, position, until);
        rows_.attend(s, [&](int i) -> const typename Rows::Values& { return values_[i]; });
      } else if constexpr (kReadsAhead) {
#pragma unroll
        for (int i = 0; i < kKeyLoads; ++i) Rows::load_queries(params_, tile_, q_[i], i);
      }
      if (!more) return;
      kReadsAhead ? load_values() : load_keys();
      has = true;
    }
  }

 private:
  // Finds the rows of a chunk.
  __device__ __forceinline__ void locate(int chunk) {
    row_ = slots_.is_whole(chunk) ? offset(slots_.first_slot(chunk)) : -1;
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

  __device__ __forceinline__ void load_keys() {
    const int g = lane_ / 4, c = lane_ % 4;
    const T* const k = static_cast<const T*>(params_.cache.k);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      at_row(
          g + 8 * j,
          [&](int64_t row) {
#pragma unroll
            for (int i = 0; i < kKeyLoads; ++i)
              sm80::load_16_bytes(keys_[i][j], k + row + Traits::key_element(i, c));
          },
          [&] {
#pragma unroll
            for (int i = 0; i < 4 * kKeyLoads; ++i) keys_[i / 4][j][i % 4] = 0;
          });
    }
  }

  __device__ __forceinline__ void load_values() {
    const int c = lane_ % 4;
    const T* const v = static_cast<const T*>(params_.cache.v);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      at_row(
          2 * c + j % 2 + j / 2 * 8,
          [&](int64_t row) {
#pragma unroll
            for (int i = 0; i < Rows::kValueLoads; ++i)
              sm80::load_16_bytes(values_[i][j], v + row + rows_.value_element(i));
            if constexpr (Rows::kHalfLoad)
              sm80::load_8_bytes(values_[kValueLoads - 1][j],
                                 v + row + rows_.value_element(kValueLoads - 1));
          },
          [&] {
#pragma unroll
            for (int i = 0; i < 4 * kValueLoads; ++i) values_[i / 4][j][i % 4] = 0;
          });
    }
  }

  const DecodeParams& params_;
  const CacheSlots& slots_;
  const Tile& tile_;
  Rows& rows_;
  const int lane_;
  // The chunk that is read next. Whole, all see all of it and `row_` is the offset of its first
  // row, in elements; otherwise that of row lane % 16, or -1, which queries at position_ to until_
  // see.
  bool whole_ = false;
  int64_t row_ = -1;
  int position_ = 0, until_ = -1;
  typename Rows::Queries q_[kReadsAhead ? kKeyLoads : 1];
  typename Rows::Keys keys_[kKeyLoads];
  typename Rows::Values values_[kValueLoads];
};

}  // namespace longgen::decode
