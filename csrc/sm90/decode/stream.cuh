// A warp's keys and values through shared memory: the bulk copy engine keeps a ring filled that is
// the warp's own, so that no warp waits for another.
#pragma once

#include <type_traits>

#include "arch/sm90/shared_copy.cuh"
#include "arch/sm90/tma.cuh"
#include "attention/cache_slots.cuh"
#include "decode/append.cuh"
#include "decode/shares.cuh"
#include "sm90/decode/inputs.cuh"
#include "sm90/decode/traits.cuh"
#include "sm90/decode/warp_rows.cuh"

namespace longgen::sm90 {

// (head_dim, slots, KV heads, sequences or pages)
struct CacheMaps {
  CUtensorMap k, v;
};

// New tokens, from position `fresh` on, are not in the cache when the copies start: their rows are
// written to the ring after them, and to the cache.
//
// `tile` is the one that is attended to. Its last pairs are on their way when the ring's free
// stages are filled from the next, if there is one: that is what `prepare` is told, and `slots`.
template <typename Traits>
class BulkStream {
  using T = typename Traits::T;
  using Cached = typename Traits::Cached;
  using Rows = WarpRows<Traits>;
  static constexpr int kChunks = Traits::kChunks;
  static constexpr int kStride = kChunks * Traits::kWarps;  // from one pair to the warp's next
  static constexpr int kPieces = Traits::kHeadDim / 8;      // of 8 elements, of a token
  using NewElements = std::conditional_t<sizeof(Cached) == 1, uint2, uint4>;  // a piece's

 public:
  __device__ BulkStream(const DecodeParams& params, const CacheMaps& maps, const CacheSlots& slots,
                        const decode::Tile& tile, typename Traits::Shared& shared)
      : params_(params),
        maps_(maps),
        slots_(slots),
        tile_(tile),
        warp_(decode::uniform(threadIdx.x / 32)),
        lane_(threadIdx.x % 32),
        shared_(shared) {}

  // Once, before anything else.
  static __device__ __forceinline__ void set_up(const CacheMaps& maps,
                                                typename Traits::Shared& shared, int warp) {
    if (threadIdx.x % 32 == 0) {
      prefetch_descriptor(maps.k);
      prefetch_descriptor(maps.v);
      for (int i = 0; i < Traits::kStages + (warp == Traits::kWarps - 1); ++i) {
        shared.full[warp * Traits::kStages + i][0].init(kChunks);
        shared.full[warp * Traits::kStages + i][1].init(kChunks);
      }
      fence_barrier_init();
    }
    __syncwarp();
  }

  static __device__ __forceinline__ int pairs_of(const CacheSlots& slots) {
    return (slots.count() + kChunks - 1) / kChunks;
  }

  // In a persistent block: the tile is its task of this number.
  __device__ __forceinline__ void begin_task(int task) { inputs_ = task % 2; }

  // Finds the warp's chunks of a share of the sequence's pairs: each warp in turn has one, warp
  // number `turn` the first. But the sequence's last pair, if it is half or has new tokens, is
  // apart: the last warp's first, in a stage of its own. As one more round for one of the warps it
  // would cost the block the time of a copy, and of the mask after that.
  __device__ __forceinline__ void prepare(const decode::Tile& tile, decode::Share share,
                                          bool has_new, int turn = 0) {
    sequence_ = tile.sequence;
    kv_head_ = tile.kv_head;
    const int chunks = slots_.count(), pairs = pairs_of(slots_);
    const bool apart =
        share.first < share.last && share.last == pairs && (has_new || chunks % kChunks != 0);
    begin_ = share.first * kChunks;
    end_ = (share.last - apart) * kChunks;
    last_ = share.last * kChunks;
    apart_ = apart && warp_ == Traits::kWarps - 1;
    const int behind = warp_ < turn ? warp_ - turn + Traits::kWarps : warp_ - turn;
    first_ = begin_ + behind * kChunks;
    if (apart_) first_ -= kStride;
    next_ = first_;
    find();
  }

  // Asks for the first of them, where `busy` stages of the ring have pairs of the share before: for
  // keys, and after those for values, which what comes between does not wait behind.
  __device__ __forceinline__ void start_keys(int busy = 0) {
    ask<0>(busy);
    classify(first_);  // now: nothing was to come before the copies
#pragma unroll
    for (int i = -1; i < Traits::kStages; ++i) {
      if (i < 0 ? apart_ : i + busy < Traits::kStages)
        set_whole(stage_of_first(i, busy), kChunks * (i + apart_));
    }
  }
  __device__ __forceinline__ void start_values(int busy = 0) { ask<1>(busy); }

  // Waits for what those asked for, so that all can be prepared again.
  __device__ __forceinline__ void drop() {
    int stage = 0;
#pragma unroll 1
    for (int pair = first_; pair < next_; pair += kStride) {
      const int at = pair < begin_ ? Traits::kStages : stage++;
      full(at, 0).wait(parity_ >> at & 1);
      full(at, 1).wait(parity_ >> at & 1);
      parity_ ^= 1u << at;
    }
    begin_ = end_ = first_ = next_ = 0;
  }

  // Writes the new tokens of the share to the cache. Where the chunks are read they are put over
  // what was copied, so it does not matter what that was. Blocks of other row tiles write the same.
  __device__ __forceinline__ void append(int fresh, int end) const {
#pragma unroll 1
    for (int i = warp_; i < end - fresh; i += Traits::kWarps) {
      const int chunk = slots_.chunk_of(fresh + i);
      if (chunk < begin_ || chunk >= last_) continue;
      const int64_t target =
          slot_offset(params_.cache, tile_.sequence, tile_.kv_head, slots_.slot(fresh + i, end));
      if (target < 0) continue;
#pragma unroll
      for (int first = 0; first < 2 * kPieces; first += 32) {
        const int half = (first + lane_) / kPieces, piece = (first + lane_) % kPieces;
        if (half > 1) continue;
        const NewElements elements = new_elements(half, i, piece);
        Cached* const cache = static_cast<Cached*>(half == 0 ? params_.cache.k : params_.cache.v);
        *reinterpret_cast<NewElements*>(cache + target + 8 * piece) = elements;
      }
    }
  }

  // Attends to the chunks. In a persistent block `go_on` is called when none are left to be asked
  // for. It may prepare another share, and start that where so many stages are still busy.
  template <typename GoOn>
  __device__ __forceinline__ void run(int fresh, Rows& rows, GoOn go_on) {
    const int begin = begin_, end = end_;
    bool has_gone_on = !Traits::kPersistent;
#pragma unroll 1
    for (int pair = first_;; pair += kStride) {
      const bool is_there = pair < end, in_ring = pair >= begin;
      const int at = in_ring ? stage_ : Traits::kStages;
      const bool whole = !is_there || (whole_ >> at & 1) != 0;
      Partial partial;
      if (!whole) partial = look_at(in_ring ? pair : end);
      if (!has_gone_on && in_ring && pair + kStride >= end) {
        has_gone_on = true;
        go_on(is_there);
      }
      if (!is_there) break;
      attend(at, in_ring && next_ < end_, whole, partial, fresh, rows);
      parity_ ^= 1u << at;
      if (!in_ring) continue;
      stage_ = (stage_ + 1) % Traits::kStages;
      if (Traits::kBytes == 2 && is_meeting(pair - begin, end - begin)) meet();
    }
  }

 private:
  // Whether warps wait for each other after the round, of a pair for each, that this one is in:
  // when 4, 8, 16 and so on are left. If they drift apart, memory is idle while the last of them
  // finish. But where computing takes as long as reading, as with e4m3, waiting costs more.
  static __device__ __forceinline__ bool is_meeting(int chunk, int chunks) {
    const int left = unsigned(chunks - chunk / kStride * kStride - 1) / kStride;
    return left >= 4 && (left & (left - 1)) == 0;
  }

  static __device__ __forceinline__ void meet() {
    if constexpr (Traits::kPersistent) {
      named_barrier_sync(Traits::kAttendBarrier, Traits::kAttendThreads);
    } else {
      __syncthreads();
    }
  }

  // Where the i-th of the first pairs goes; -1: the one apart.
  __device__ __forceinline__ int stage_of_first(int i, int busy) const {
    return i < 0 ? Traits::kStages : (stage_ + busy + i) % Traits::kStages;
  }
  // Whether the pair of a stage is whole: a bit of `wholes_`.
  __device__ __forceinline__ void set_whole(int stage, int bit) {
    whole_ = (whole_ & ~(1u << stage)) | (wholes_ >> bit & 1) << stage;
  }

  // Asks for keys (half 0) or values (half 1) of the first pairs; after the values, the pair after
  // them is the next.
  template <int kHalf>
  __device__ __forceinline__ void ask(int busy) {
#pragma unroll
    for (int i = -1; i < Traits::kStages; ++i) {
      const int pair = first_ + (i + apart_) * kStride;
      if (i < 0 ? !apart_ : pair >= end_ || i + busy >= Traits::kStages) continue;
      copy(stage_of_first(i, busy), kHalf, kChunks * (i + apart_));
      if (kHalf == 0) continue;
      found_ += kChunks;
      next_ += kStride;
    }
  }

  // Copies keys (half 0) or values (half 1) of the pair that lanes have found, from `found` on, to
  // the stage.
  __device__ __forceinline__ void copy(int stage, int half, int found) {
    if (unsigned(lane_ - found) < kChunks) {  // a lane copies the chunk that it has found
      Mbarrier& barrier = full(stage, half);
      if (place_.row >= 0) {
        barrier.arrive_and_expect(Traits::kChunkBytes);
        char* const to =
            ring(stage) + half * Traits::kHalfBytes + lane_ % kChunks * Traits::kChunkBytes;
#pragma unroll
        for (int box = 0; box < Traits::kBoxes; ++box)
          copy_box(half == 0 ? maps_.k : maps_.v, barrier, to + box * Traits::kBoxBytes,
                   Traits::kBoxElements * box, place_.row, kv_head_, place_.block);
      } else {
        barrier.arrive();
      }
    }
  }
  // The same of the next pair; after the values, the pair after it is the next.
  __device__ __forceinline__ void fetch(int stage, int half) {
    copy(stage, half, found_);
    if (half == 0) return;
    set_whole(stage, found_);
    found_ += kChunks;
    next_ += kStride;
    if (found_ == 32) {
      find();
      classify(next_);
    }
  }

  // Each lane finds one of the next 32. Rows outside the cache become zeros, all of them where
  // there is no page.
  __device__ __forceinline__ void find() {
    const int chunk = found_at(next_);
    place_ = place_of(params_.cache, sequence_, slots_.first_slot(chunk));
    if (chunk >= slots_.count()) place_.row = -1;
    found_ = 0;
  }
  __device__ __forceinline__ void classify(int next) {
    wholes_ = __ballot_sync(
        0xffffffff, place_.row >= 0 && place_.block >= 0 && slots_.is_whole(found_at(next)));
    wholes_ &= wholes_ >> 1;
  }

  __device__ __forceinline__ const typename Traits::Inputs& inputs() const {
    return shared_.inputs[Traits::kPersistent ? inputs_ : 0];
  }

  // A stage of this warp, and its barriers: of keys, of values.
  __device__ __forceinline__ char* ring(int stage) const {
    return shared_.ring[warp_ * Traits::kStages + stage];
  }
  __device__ __forceinline__ Mbarrier& full(int stage, int half) const {
    return shared_.full[warp_ * Traits::kStages + stage][half];
  }

  __device__ __forceinline__ int found_at(int next) const {
    return chunk_of(next + lane_ / kChunks * kStride) + lane_ % kChunks;
  }

  // The first chunk of a pair: the one apart stands before all others.
  __device__ __forceinline__ int chunk_of(int pair) const { return pair < begin_ ? end_ : pair; }

  // Of a pair that is not whole, in each lane a row: its token's position, and the last one that
  // sees it; -1: there is none.
  struct Partial {
    int position, until;
  };
  __device__ __forceinline__ Partial look_at(int chunk) const {
    chunk += lane_ / kChunk;
    CacheSlots::Token token{0, -1, -1};
    if (chunk < slots_.count()) token = slots_.token(chunk, lane_ % kChunk);
    const bool is_there = place_of(params_.cache, tile_.sequence, token.slot).block >= 0;
    return {token.position, is_there ? token.until : -1};
  }

  // To the pair of a stage, which if there are more to ask for is that of the next.
  __device__ __forceinline__ void attend(int at, bool more, bool whole, const Partial& partial,
                                         int fresh, Rows& rows) {
    const uint32_t keys_at = shared_address(ring(at));
    const uint32_t values_at = keys_at + Traits::kHalfBytes;
    const uint32_t parity = parity_ >> at & 1;
    // The next keys are asked for as soon as these are read; but where big blocks follow each other
    // on each multiprocessor, when the values have come: memory is 0.2 to 0.6% faster so.
    const bool are_rounds = params_.splits == 1 || params_.whole_tiles > 0;
    const bool at_once =
        Traits::kSmall || Traits::kPersistent || Traits::kBytes == 1 || !are_rounds;
    full(at, 0).wait(parity);
    if (!whole) complete(0, keys_at, partial, fresh);

    typename Rows::Scores s;
    rows.score(s, keys_at, inputs());
    __syncwarp();  // all have read the keys
    if (more && at_once) fetch(at, 0);
    if (!whole) rows.mask(s, partial.position, partial.until);

    full(at, 1).wait(parity);
    if (more && !at_once) fetch(at, 0);
    if (!whole) complete(1, values_at, partial, fresh);

    rows.attend(s, values_at);
    __syncwarp();
    if (more) fetch(at, 1);
  }

  // Writes the new tokens' rows to keys or values, and zeros to the values that no query sees: what
  // lies there (NaN, another sequence's token) would reach the output with weight 0.
  __device__ __forceinline__ void complete(int half, uint32_t at, const Partial& partial,
                                           int fresh) const {
    if (half == 1) {
      constexpr int kEach = 16 / Traits::kBytes, kZeros = Traits::kHeadDim / kEach;
      const uint32_t absent = __ballot_sync(0xffffffff, partial.until < 0);
#pragma unroll
      for (int i = 0; i < 32 * kZeros; i += 32) {
        const int row = (i + lane_) / kZeros, column = (i + lane_) % kZeros * kEach;
        if ((absent >> row & 1) != 0) store_shared(at + Traits::swizzled(row, column), uint4{});
      }
    }
    const int new_token = partial.position - fresh;
    uint32_t written = __ballot_sync(0xffffffff, partial.until >= 0 && new_token >= 0);
#pragma unroll 1
    for (; written != 0; written &= written - 1) {
      const int row = __ffs(written) - 1;
      const int i = __shfl_sync(0xffffffff, new_token, row);
      if (lane_ < kPieces)
        store_shared(at + Traits::swizzled(row, 8 * lane_), new_elements(half, i, lane_));
    }
    fence_async_proxy();  // before the next copy to this place
    __syncwarp();
  }

  // A piece of a new token's key (half 0) or value, as the cache has it.
  __device__ __forceinline__ NewElements new_elements(int half, int i, int piece) const {
    const uint4 x =
        i == 0 ? inputs().new_token[half][piece] : *new_piece(params_, tile_, half, i, piece);
    if constexpr (Traits::kBytes == 1) {
      const float scale = (half == 0 ? params_.scales.k : params_.scales.v)[tile_.kv_head];
      return decode::to_fp8<T>(x, 1.f / scale);
    } else {
      return x;
    }
  }

  const DecodeParams& params_;
  const CacheMaps& maps_;
  const CacheSlots& slots_;
  const decode::Tile& tile_;
  const int warp_, lane_;
  typename Traits::Shared& shared_;
  // What is prepared: of which sequence and head; chunks: the first, the one apart or after all,
  // after that; of this warp's pairs the first, and the next to fetch; whether the first is the one
  // apart.
  int sequence_, kv_head_;
  int begin_ = 0, end_ = 0, last_;
  int first_ = 0, next_ = 0;
  bool apart_;
  int inputs_ = 0;       // of the tile: which of the two that a persistent block has
  int stage_ = 0;        // of the ring's next pair to attend to
  uint32_t parity_ = 0;  // of each stage's next phase
  uint32_t whole_ = 0;   // whether each stage's pair is whole
  // 32 chunks, one in each lane, and where it lies; the bits of the first of pairs that are whole;
  // the lane of the next to fetch.
  Place place_;
  uint32_t wholes_;
  int found_;
};

}  // namespace longgen::sm90
