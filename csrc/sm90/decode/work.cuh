// What a block of the persistent decode kernel works on, found from the lengths of all sequences.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "decode/tile.cuh"
#include "sm90/decode/lengths.cuh"
#include "sm90/decode/stream.cuh"
#include "sm90/decode/task.cuh"

namespace longgen::sm90 {

// The row of all tiles, the block's run of it, and the tile that comes next in that; then its whole
// tiles. Each lane knows a sequence. All its tiles take up as many places as that of the first KV
// head has pairs: others may have a few more or less, if their strided blocks lie elsewhere.
template <typename Traits>
class Work {
  static constexpr unsigned kAll = 0xffffffff;
  static constexpr int kMaxTokens = 1 << 30;

 public:
  Work() = default;

  // Of lengths read too early, which may be anything, follows work that is not to be done, but no
  // tile that there is not.
  __device__ Work(const DecodeParams& params, const Lengths& lengths)
      : tiles_(params.cache.kv_heads * params.row_tiles),
        old_(min(max(lengths.old, 0), kMaxTokens)),
        end_(old_ + decode::tokens_of_said(params.new_tokens, lengths.said)),
        lane_places_(places_of(params, old_, end_)),
        upto_(sum_upto(tiles_ * lane_places_)),
        whole_(0) {
    const int all = params.cache.batch * tiles_;
    const int places = __shfl_sync(kAll, lane_places_, 0);
    int shared_places = __shfl_sync(kAll, upto_, 31);
    const bool is_there = threadIdx.x % 32 < params.cache.batch;
    if (__all_sync(kAll, !is_there || lane_places_ == places) && all >= int(gridDim.x)) {
      const WholeTiles tiles = WholeTiles::of(all, gridDim.x);
      shared_places = tiles.shared * places;
      whole_ = all - tiles.first(blockIdx.x);
    }
    run_ = Run<Traits::kBeginning>(shared_places, gridDim.x, blockIdx.x);
    if (run_.empty()) return;
    sequence_ = __ffs(__ballot_sync(kAll, upto_ > run_.next())) - 1;
    places_ = __shfl_sync(kAll, lane_places_, sequence_);
    const int before = __shfl_sync(kAll, upto_, sequence_) - tiles_ * places_;
    number_ = unsigned(run_.next() - before) / unsigned(places_);
    start_ = before + number_ * places_;
    run_.go_on(start_, start_ + places_);
  }

  __device__ __forceinline__ bool empty() const { return run_.empty() && whole_ <= 0; }

  // The next task; `slots` become those of its tile.
  __device__ __forceinline__ Task take(const DecodeParams& params, CacheSlots& slots) {
    const bool is_whole = run_.empty();
    if (is_whole) {
      const int tile = params.cache.batch * tiles_ - whole_;
      sequence_ = unsigned(tile) / unsigned(tiles_);
      number_ = tile - sequence_ * tiles_;
    }
    const decode::Tile tile = decode::tile_of<Traits::kRows>(params, sequence_, number_);
    const int old = __shfl_sync(kAll, old_, sequence_), end = __shfl_sync(kAll, end_, sequence_);
    const int p0 = old + params.q_offset;
    slots.visit(tile.kv_head, p0 + tile.token(params, 0), p0 + tile.token(params, tile.rows - 1),
                end, old);
    const int pairs = BulkStream<Traits>::pairs_of(slots);
    const Piece piece = is_whole ? Piece{{0, pairs}, int(blockIdx.x), 0, 1}
                                 : run_.piece(start_, start_ + places_, pairs);
    const Task task{tile, piece, old, end, turn_};
    turn_ = (turn_ + piece.pairs.last - piece.pairs.first) % Traits::kWarps;
    if (is_whole) {
      whole_ -= gridDim.x;
    } else {
      go_on();
    }
    return task;
  }

 private:
  __device__ __forceinline__ void go_on() {
    start_ += places_;
    if (++number_ == tiles_) {
      number_ = 0;
      ++sequence_;  // after the last one, any lane's places do
      places_ = __shfl_sync(kAll, lane_places_, sequence_);
    }
    run_.go_on(start_, start_ + places_);
  }

  static __device__ __forceinline__ int places_of(const DecodeParams& params, int old, int end) {
    if (threadIdx.x % 32 >= params.cache.batch) return 0;
    const int p0 = old + params.q_offset;
    const CacheSlots slots(params.cache, 0, p0, p0 + params.n - 1, end);
    return BulkStream<Traits>::pairs_of(slots) + Traits::kBeginning;
  }
  // Of this lane and those before it.
  static __device__ __forceinline__ int sum_upto(int x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAll, x, distance);
      if (threadIdx.x % 32 >= distance) x += before;
    }
    return x;
  }

  int tiles_;  // of a sequence
  // Of the lane's sequence: tokens, places of a tile, places of all tiles up to its last.
  int old_, end_, lane_places_, upto_;
  int whole_;  // tiles from the block's next whole one on
  Run<Traits::kBeginning> run_;
  // The run's next tile: of which sequence, which of its tiles, its first place, and how many it
  // has.
  int sequence_ = 0, number_ = 0, start_ = 0, places_ = 0;
  int turn_ = 0;  // the warp that continues where the others end
};

// The lengths, and whether they are those of the last look, which may have been before the kernels
// ahead had ended.
class LatestLengths {
 public:
  // With pages, which kernels may move without a trace, they are looked at after those.
  __device__ explicit LatestLengths(const DecodeParams& params)
      : params_(params), sequence_(min(threadIdx.x % 32, params.cache.batch - 1)) {
    has_waited_ = params.cache.block_table != nullptr;
    if (has_waited_) wait_for_previous_kernels();
    now_ = read_lengths(params, sequence_);
  }
  __device__ __forceinline__ const Lengths& get() const { return now_; }

  // Asks for them again when the kernels ahead have ended.
  __device__ __forceinline__ void wait() {
    before_ = now_;
    if (has_waited_) return;
    has_waited_ = true;
    wait_for_previous_kernels();
    now_ = read_lengths(params_, sequence_);
  }
  // After that, and after what was to come before they are waited for: whether there are others
  // now.
  __device__ __forceinline__ bool have_changed() {
    asm volatile("" : "+r"(now_.old), "+r"(now_.said)::"memory");
    return __any_sync(0xffffffff, now_ != before_);
  }

 private:
  const DecodeParams& params_;
  const int sequence_;  // that the lane knows
  bool has_waited_;
  Lengths now_, before_;
};

}  // namespace longgen::sm90
