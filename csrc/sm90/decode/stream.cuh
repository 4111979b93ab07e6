// A warp's keys and values through shared memory: the bulk copy engine keeps a ring filled that is
// the warp's own, so that no warp waits for another.
#pragma once

#include "arch/sm90/shared_copy.cuh"
#include "arch/sm90/tma.cuh"
#include "attention/cache_slots.cuh"
#include "decode/append.cuh"
#include "decode/warp_rows.cuh"
#include "sm90/decode/inputs.cuh"
#include "sm90/decode/traits.cuh"

namespace longgen::sm90 {

// (head_dim, slots, KV heads, sequences or pages)
struct CacheMaps {
  CUtensorMap k, v;
};

// New tokens, from position `fresh` on, are not in the cache when the copies start: their rows are
// written to the ring after them, and to the cache.
template <typename Traits>
class BulkStream {
  using T = typename Traits::T;
  using Cached = typename Traits::Cached;
  using Rows = decode::WarpRows<Traits>;
  static constexpr int kChunks = Traits::kChunks;
  static constexpr int kStride = kChunks * Traits::kWarps;  // from one pair to the warp's next

 public:
  __device__ BulkStream(const DecodeParams& params, const CacheMaps& maps, const CacheSlots& slots,
                        const decode::Tile& tile, typename Traits::Shared& shared)
      : params_(params),
        maps_(maps),
        slots_(slots),
        tile_(tile),
        lane_(threadIdx.x % 32),
        ring_(shared.ring[decode::uniform(threadIdx.x / 32)]),
        full_(shared.full[decode::uniform(threadIdx.x / 32)]),
        inputs_(shared.inputs) {}

  // Finds the warp's chunks: of each warp in turn a pair of neighbours, the last perhaps half.
  __device__ __forceinline__ void prepare(const decode::Share& share) {
    first_ = next_ = share.first + decode::uniform(threadIdx.x / 32) * kChunks;
    end_ = share.last;
    find();
  }

  // Asks for the first of them.
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int stage = 0; stage < Traits::kStages && next_ < end_; ++stage) {
      fetch(stage, 0);
      fetch(stage, 1);
    }
    classify();  // now: nothing was to come before the copies
    whole_ = 0;
#pragma unroll
    for (int stage = 0; stage < Traits::kStages; ++stage)
      whole_ |= (wholes_ >> kChunks * stage & 1) << stage;
  }

  // Waits for what `start` asked for, so that it can be called again.
  __device__ __forceinline__ void drop() {
#pragma unroll 1
    for (int stage = 0; first_ + stage * kStride < next_; ++stage) {
      full_[stage][0].wait(parity_ >> stage & 1);
      full_[stage][1].wait(parity_ >> stage & 1);
      parity_ ^= 1u << stage;
    }
  }

  // Attends to the chunks.
  __device__ __forceinline__ void run(int fresh, Rows& rows) {
    int stage = 0;
#pragma unroll 1
    for (int chunk = first_; chunk < end_; chunk += kStride) {
      attend(chunk, stage, fresh, rows);
      parity_ ^= 1u << stage;
      if (++stage == Traits::kStages) stage = 0;
    }
  }

 private:
  // Copies keys (half 0) or values (half 1) of the next pair to the stage. After the values, the
  // pair after it is the next.
  __device__ __forceinline__ void fetch(int stage, int half) {
    if (half == 0 && found_ == 32) {
      find();
      classify();
    }
    if (unsigned(lane_ - found_) < kChunks) {  // a lane copies the chunk that it has found
      Mbarrier& full = full_[stage][half];
      if (found_at_ < end_) {
        full.arrive_and_expect(Traits::kChunkBytes);
        char* const to =
            ring_[stage] + half * Traits::kHalfBytes + lane_ % kChunks * Traits::kChunkBytes;
#pragma unroll
        for (int box = 0; box < Traits::kBoxes; ++box)
          copy_box(half == 0 ? maps_.k : maps_.v, full, to + box * Traits::kBoxBytes,
                   Traits::kBoxElements * box, place_.row, tile_.kv_head, place_.block);
      } else {
        full.arrive();
      }
    }
    if (half == 0) return;
    whole_ = (whole_ & ~(1u << stage)) | (wholes_ >> found_ & 1) << stage;
    found_ += kChunks;
    next_ += kStride;
  }

  // Each lane finds one of the next 32. Rows outside the cache become zeros, all of them where
  // there is no page.
  __device__ __forceinline__ void find() {
    found_at_ = next_ + lane_ / kChunks * kStride + lane_ % kChunks;
    place_ = place_of(params_.cache, tile_.sequence, slots_.first_slot(found_at_));
    found_ = 0;
  }
  __device__ __forceinline__ void classify() {
    wholes_ = __ballot_sync(0xffffffff,
                            found_at_ < end_ && slots_.is_whole(found_at_) && place_.block >= 0);
    wholes_ &= wholes_ >> 1;
  }

  __device__ __forceinline__ void attend(int chunk, int stage, int fresh, Rows& rows) {
    const uint32_t keys_at = shared_address(ring_[stage]);
    const uint32_t values_at = keys_at + Traits::kHalfBytes;
    const bool whole = whole_ >> stage & 1;
    int position = 0, until = -1;
    CacheSlots::Token token{0, -1, -1};
    if (!whole) {  // each lane has a row
      chunk += lane_ / kChunk;
      if (chunk < end_) token = slots_.token(chunk, lane_ % kChunk);
      position = token.position;
      until = is_there(token.slot) ? token.until : -1;
    }
    const uint32_t parity = parity_ >> stage & 1;
    const bool more = next_ < end_;
    full_[stage][0].wait(parity);
    if (!whole) complete(0, keys_at, token, until, fresh);

    const int c = lane_ % 4;
    typename Rows::Scores s;
    typename Rows::Keys keys[Traits::kBytes == 1 ? 2 : 1];
    typename Rows::Queries q;
    rows.score(
        s, [&](int i) -> const typename Rows::Keys& { return load_keys(keys, keys_at, i); },
        [&](int i) -> const typename Rows::Queries& {
#pragma unroll
          for (int octet = 0; octet < Traits::kOctets; ++octet)
            load_shared_16_bytes(q[octet], shared_address(&inputs_.queries[i][octet][lane_]));
          return q;
        });
    __syncwarp();  // all have read the keys
    if (more) fetch(stage, 0);
    if (!whole) rows.mask(s, position, until);

    full_[stage][1].wait(parity);
    if (!whole) complete(1, values_at, token, until, fresh);

    typename Rows::Values values;
    rows.attend(s, [&](int h, int i) -> const typename Rows::Values& {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t at =
            values_at + swizzled(16 * h + 2 * c + j % 2 + j / 2 * 8, rows.value_element(i));
        if constexpr (Traits::kBytes == 1) {
          uint32_t x[2];
          load_shared_8_bytes(x, at);
          decode::from_fp8<T>(values[j], x[0], x[1]);
        } else if (i < Rows::kValueLoads) {
          load_shared_16_bytes(values[j], at);
        } else {
          load_shared_8_bytes(values[j], at);
        }
      }
      return values;
    });
    __syncwarp();
    if (more) fetch(stage, 1);
  }

  // The keys of load `i`. 16 bytes of an e4m3 key are those of two loads, of which the first reads.
  __device__ __forceinline__ const typename Rows::Keys& load_keys(
      typename Rows::Keys (&keys)[Traits::kBytes == 1 ? 2 : 1], uint32_t at, int i) const {
    const int g = lane_ / 4, c = lane_ % 4;
#pragma unroll
    for (int j = 0; j < Traits::kKeyTiles; ++j) {
      const uint32_t from = at + swizzled(g + 8 * j, Traits::key_element(i, c));
      if constexpr (Traits::kBytes == 2) {
        load_shared_16_bytes(keys[0][j], from);
      } else if (i % 2 == 0) {
        uint32_t x[4];
        load_shared_16_bytes(x, from);
        decode::from_fp8<T>(keys[0][j], x[0], x[1]);
        decode::from_fp8<T>(keys[1][j], x[2], x[3]);
      }
    }
    return keys[Traits::kBytes == 1 ? i % 2 : 0];
  }

  // Writes the new tokens' rows to keys or values, and zeros to the values that no query sees: what
  // lies there (NaN, another sequence's token) would reach the output with weight 0.
  __device__ __forceinline__ void complete(int half, uint32_t at, const CacheSlots::Token& token,
                                           int until, int fresh) const {
    constexpr int kPieces = Traits::kHeadDim / 8;  // of 16 bytes of T, of a row
    if (half == 1) {
      constexpr int kEach = 16 / Traits::kBytes, kZeros = Traits::kHeadDim / kEach;
      const uint32_t absent = __ballot_sync(0xffffffff, until < 0);
#pragma unroll
      for (int i = 0; i < 32 * kZeros; i += 32) {
        const int row = (i + lane_) / kZeros, column = (i + lane_) % kZeros * kEach;
        if ((absent >> row & 1) != 0) store_shared(at + swizzled(row, column), uint4{});
      }
    }
    uint32_t written = __ballot_sync(0xffffffff, until >= 0 && token.position >= fresh);
#pragma unroll 1
    for (; written != 0; written &= written - 1) {
      const int row = __ffs(written) - 1;
      const int i = __shfl_sync(0xffffffff, token.position, row) - fresh;
      const int slot = __shfl_sync(0xffffffff, token.slot, row);
      if (lane_ >= kPieces) continue;
      const int64_t target =
          slot_offset(params_.cache, tile_.sequence, tile_.kv_head, slot) + 8 * lane_;
      const uint4 x =
          i == 0 ? inputs_.new_token[half][lane_] : *new_piece(params_, tile_, half, i, lane_);
      const auto store = [&](auto elements) {
        store_shared(at + swizzled(row, 8 * lane_), elements);
        void* const cache = half == 0 ? params_.cache.k : params_.cache.v;
        *reinterpret_cast<decltype(elements)*>(static_cast<Cached*>(cache) + target) = elements;
      };
      if constexpr (Traits::kBytes == 1) {
        const float scale = (half == 0 ? params_.scales.k : params_.scales.v)[tile_.kv_head];
        store(decode::to_fp8<T>(x, 1.f / scale));
      } else {
        store(x);
      }
    }
    fence_async_proxy();  // before the next copy to this place
    __syncwarp();
  }

  __device__ __forceinline__ bool is_there(int slot) const {
    return place_of(params_.cache, tile_.sequence, slot).block >= 0;
  }

  // Where a row's element lies from the first box. Pieces of 16 bytes are exchanged by the number
  // of the 128 bytes that they lie in.
  static __device__ __forceinline__ uint32_t swizzled(int row, int element) {
    constexpr int kBox = Traits::kBoxElements, kRow = Traits::kRowBytes;
    return row / kChunk * Traits::kChunkBytes + element / kBox * Traits::kBoxBytes +
           row % kChunk * kRow +
           ((element % kBox * Traits::kBytes) ^ (row * kRow / 128 % (kRow / 16) * 16));
  }

  const DecodeParams& params_;
  const CacheMaps& maps_;
  const CacheSlots& slots_;
  const decode::Tile& tile_;
  const int lane_;
  char (&ring_)[Traits::kStages][Traits::kStageBytes];
  Mbarrier (&full_)[Traits::kStages][2];
  const typename Traits::Inputs& inputs_;
  int first_, next_, end_;  // chunks: the first, the next to fetch
  uint32_t parity_ = 0;     // of each stage's next phase
  uint32_t whole_;          // stages whose pair is whole
  // 32 chunks, one in each lane, and where it lies; the bits of the first of pairs that are whole;
  // the lane of the next to fetch.
  int found_at_;
  Place place_;
  uint32_t wholes_;
  int found_;
};

}  // namespace longgen::sm90
