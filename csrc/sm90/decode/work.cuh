// What a block of the persistent decode kernel works on, found from the lengths of all sequences.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "decode/tile.cuh"
#include "sm90/decode/lengths.cuh"
#include "sm90/decode/stream.cuh"
#include "sm90/decode/task.cuh"

namespace longgen::sm90 {

// The row of all tiles, the block's run of it, and the tile that comes next in that; then the tiles
// that it owns. Each lane knows a sequence. All its tiles take up as many places as that of the
// first KV head has pairs: others may have a few more or less, if their strided blocks lie
// elsewhere.
template <typename Traits>
class Work {
  static constexpr unsigned kAll = 0xffffffff;
  static constexpr int kMaxTokens = 1 << 30, kBeginning = Traits::kBeginning;

 public:
  Work() = default;

  // Reads the lengths. What follows from them if that was too early, when they may be anything, is
  // not to be done, but no tile that there is not.
  __device__ explicit Work(const DecodeParams& params) : Work(params, lengths(params)) {}

  // Reads them once more: `are_same` says later whether those were the same.
  static __device__ __forceinline__ Lengths lengths(const DecodeParams& params) {
    return read_lengths(params, min(threadIdx.x % 32, params.cache.batch - 1));
  }
  __device__ __forceinline__ bool are_same(const DecodeParams& params, Lengths now) const {
    // Not waited for before this.
    asm volatile("" : "+r"(now.old), "+r"(now.said)::"memory");
    const int old = old_of(now);
    return __all_sync(kAll, old == old_ && end_of(params, old, now) == end_);
  }

  __device__ __forceinline__ bool empty() const { return run_.empty() && owned_ <= 0; }

  // The next task; `slots` become those of its tile.
  __device__ __forceinline__ Task take(const DecodeParams& params, CacheSlots& slots) {
    const int each = tiles_of_sequence(params), all = params.cache.batch * each;
    const bool owns = run_.empty();
    const int index = owns ? all - owned_ : sequence_ * each + number_;
    if (owns) sequence_ = unsigned(index) / unsigned(each);
    const int places = __shfl_sync(kAll, places_, sequence_);
    if (owns) start_ = index * places;
    const decode::Tile tile =
        decode::tile_of<Traits::kRows>(params, sequence_, index - sequence_ * each);
    const int old = __shfl_sync(kAll, old_, sequence_), end = __shfl_sync(kAll, end_, sequence_);
    const int p0 = old + params.q_offset;
    slots.visit(tile.kv_head, p0 + tile.token(params, 0), p0 + tile.token(params, tile.rows - 1),
                end, old);
    const int pairs = BulkStream<Traits>::pairs_of(slots);
    const Piece of_run = run_.piece(blockIdx.x, start_, start_ + places, equal_.shared_of(pairs));
    const int first_block = run_.first_block(start_, start_ + places);
    const Piece piece = owns ? equal_.own_piece(of_run, first_block, index, all, pairs)
                             : equal_.shared_piece(of_run, first_block, index, all);
    const Task task{tile, piece, old, end, turn_};
    turn_ = (turn_ + piece.pairs.last - piece.pairs.first) % Traits::kWarps;
    if (owns) {
      owned_ -= gridDim.x;
    } else {
      go_on(start_ + places, each);
    }
    return task;
  }

 private:
  __device__ Work(const DecodeParams& params, const Lengths& lengths)
      : old_(old_of(lengths)), end_(end_of(params, old_, lengths)) {
    const int each = tiles_of_sequence(params), all = params.cache.batch * each;
    const bool is_there = threadIdx.x % 32 < params.cache.batch;
    const int pairs = is_there ? pairs_of(params, old_, end_) : 0;
    const int pairs_of_first = __shfl_sync(kAll, pairs, 0);
    const bool are_equal = __all_sync(kAll, !is_there || pairs == pairs_of_first);
    if (are_equal) equal_ = EqualTiles::of(all, pairs_of_first, gridDim.x, Traits::kOctets);
    places_ = is_there ? equal_.shared_of(pairs) + kBeginning : 0;
    const int upto = sum_upto(each * places_);
    int row = __shfl_sync(kAll, upto, 31), blocks = gridDim.x;
    if (are_equal) {
      row = equal_.shared * __shfl_sync(kAll, places_, 0);
      blocks = equal_.sharers;
      owned_ = equal_.from_own(blockIdx.x, all);
    }
    run_ = Run<kBeginning>(row, blocks, blockIdx.x);
    if (run_.empty()) return;
    sequence_ = __ffs(__ballot_sync(kAll, upto > run_.next())) - 1;
    const int places = __shfl_sync(kAll, places_, sequence_);
    const int before = __shfl_sync(kAll, upto, sequence_) - each * places;
    number_ = unsigned(run_.next() - before) / unsigned(places);
    start_ = before + number_ * places;
    run_.go_on(start_, start_ + places);
  }

  static __device__ __forceinline__ int old_of(const Lengths& lengths) {
    return min(max(lengths.old, 0), kMaxTokens);
  }
  static __device__ __forceinline__ int end_of(const DecodeParams& params, int old,
                                               const Lengths& lengths) {
    return old + decode::tokens_of_said(params.new_tokens, lengths.said);
  }
  static __device__ __forceinline__ int tiles_of_sequence(const DecodeParams& params) {
    return params.cache.kv_heads * params.row_tiles;
  }

  // To the next tile, which begins there.
  __device__ __forceinline__ void go_on(int start, int tiles_of_sequence) {
    start_ = start;
    if (++number_ == tiles_of_sequence) {
      number_ = 0;
      ++sequence_;  // after the last one, any lane's places do
    }
    run_.go_on(start_, start_ + __shfl_sync(kAll, places_, sequence_));
  }

  static __device__ __forceinline__ int pairs_of(const DecodeParams& params, int old, int end) {
    const int p0 = old + params.q_offset;
    return BulkStream<Traits>::pairs_of(CacheSlots(params.cache, 0, p0, p0 + params.n - 1, end));
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

  int old_, end_, places_;  // of the lane's sequence: tokens, places of a tile
  EqualTiles equal_{};
  int owned_ = 0;  // tiles from the next one on that the block owns
  Run<kBeginning> run_;
  int sequence_ = 0, number_ = 0, start_ = 0;  // of the run's next tile; its first place
  int turn_ = 0;                               // the warp that continues where the others end
};

}  // namespace longgen::sm90
