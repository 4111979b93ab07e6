// Hopper's decode kernel with as many thread blocks as multiprocessors, among which all that there
// is to read is shared out evenly, however many tiles there are and however long each is.
//
// A block streams one piece of a tile after another. The chunks of the next are on their way while
// what was found in the last is merged; the blocks that share a tile meet in global memory.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "decode/combine.cuh"
#include "sm90/decode/lengths.cuh"
#include "sm90/decode/run.cuh"
#include "sm90/decode/stream.cuh"

namespace longgen::sm90 {

// The row of all tiles, the block's run of it, and the tile that comes next in that. Each lane
// knows a sequence. All its tiles take up as many places as that of the first KV head has pairs:
// others may have a few more or less, if their strided blocks lie elsewhere.
template <typename Traits>
class Work {
  static constexpr unsigned kAll = 0xffffffff;
  static constexpr int kMaxTokens = 1 << 30;

 public:
  // Of lengths read too early, which may be anything, follows work that is not to be done, but no
  // tile that there is not.
  __device__ Work(const DecodeParams& params, const Lengths& lengths)
      : tiles_(params.cache.kv_heads * params.row_tiles),
        old_(min(max(lengths.old, 0), kMaxTokens)),
        end_(old_ + decode::tokens_of_said(params.new_tokens, lengths.said)),
        lane_places_(places_of(params, old_, end_)),
        upto_(sum_upto(tiles_ * lane_places_)),
        run_(__shfl_sync(kAll, upto_, 31), gridDim.x, blockIdx.x) {
    if (run_.empty()) return;
    sequence_ = __ffs(__ballot_sync(kAll, upto_ > run_.next())) - 1;
    places_ = __shfl_sync(kAll, lane_places_, sequence_);
    const int before = __shfl_sync(kAll, upto_, sequence_) - tiles_ * places_;
    number_ = unsigned(run_.next() - before) / unsigned(places_);
    start_ = before + number_ * places_;
  }

  __device__ __forceinline__ bool empty() const { return run_.empty(); }

  // The next tile, its sequence's tokens before and after the new ones, and which of its pairs are
  // the block's.
  __device__ __forceinline__ decode::Tile tile(const DecodeParams& params) const {
    return decode::tile_of<Traits::kRows>(params, sequence_, number_);
  }
  __device__ __forceinline__ int old() const { return __shfl_sync(kAll, old_, sequence_); }
  __device__ __forceinline__ int end() const { return __shfl_sync(kAll, end_, sequence_); }
  __device__ __forceinline__ Piece piece(int pairs) const {
    return run_.piece(start_, start_ + places_, pairs);
  }
  // The warp that continues where the others have ended.
  __device__ __forceinline__ int turn() const { return unsigned(run_.done()) % Traits::kWarps; }

  __device__ __forceinline__ void go_on() {
    start_ += places_;
    run_.finish(start_);
    if (run_.empty() || ++number_ < tiles_) return;
    number_ = 0;
    ++sequence_;
    places_ = __shfl_sync(kAll, lane_places_, sequence_);
  }

 private:
  static __device__ __forceinline__ int places_of(const DecodeParams& params, int old, int end) {
    if (threadIdx.x % 32 >= params.cache.batch) return 0;
    const int p0 = old + params.q_offset;
    const CacheSlots slots(params.cache, 0, p0, p0 + params.n - 1, end);
    return BulkStream<Traits>::pairs_of(slots) + Run::kBeginning;
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
  Run run_;
  // The next tile: of which sequence, which of its tiles, its first place, and how many it has.
  int sequence_ = 0, number_ = 0, start_ = 0, places_ = 0;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    persistent_decode_kernel(const __grid_constant__ DecodeParams params,
                             const __grid_constant__ CacheMaps maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);

  const int warp = decode::uniform(threadIdx.x / 32);
  const int sequence = min(threadIdx.x % 32, params.cache.batch - 1);  // that the lane knows
  // As in decode_kernel, what follows from the lengths before the kernels ahead have ended is found
  // while they end.
  const bool paged = params.cache.block_table != nullptr;
  Lengths lengths{};
  if (!paged) lengths = read_lengths(params, sequence);
  BulkStream<Traits>::set_up(maps, shared, warp);
  let_next_kernel_start();
  if (paged) {
    wait_for_previous_kernels();
    lengths = read_lengths(params, sequence);
  }

  Work<Traits> work(params, lengths);
  CacheSlots slots(params.cache);
  decode::Tile next, tile;
  Piece next_piece, piece;
  BulkStream<Traits> stream(params, maps, slots, next, shared);
  const auto found = [&](int w) -> typename Traits::Found& { return shared.found[w]; };
  bool is_first = true, has_found = false;
#pragma unroll 1
  while (true) {
    // Asks for the first chunks of the next piece,
    const bool more = !work.empty();
    const int old = work.old(), end = work.end();
    if (more) {
      next = work.tile(params);
      const int p0 = old + params.q_offset;
      slots.visit(next.kv_head, p0 + next.token(params, 0), p0 + next.token(params, next.rows - 1),
                  end, old);
      next_piece = work.piece(stream.pairs_of(slots));
      stream.prepare(next_piece.pairs, old < end, work.turn());
    }
    Lengths now = lengths;
    if (is_first) {
      wait_for_previous_kernels();
      now = read_lengths(params, sequence);
    }
    Inputs<Traits> inputs(params, next);
    if (more) {
      inputs.load();
      stream.start();
    }
    is_first = false;
    if (__any_sync(0xffffffff, now != lengths)) {
      if (more) stream.drop();
      lengths = now;
      work = Work<Traits>(params, lengths);
      continue;
    }
    // merges what was found in the last,
    if (has_found) {
      __syncthreads();
      const typename Traits::Factors factors(params, tile.kv_head);
      decode::merge_through_memory<Traits>(
          params, tile, factors, piece.part, piece.parts, found,
          [&](int p) { return Run::place_of_part(piece.first_block, p); });
    }
    if (!more) break;
    // and attends to the next.
    inputs.store(shared.inputs);
    __syncthreads();
    tile = next;
    piece = next_piece;
    has_found = true;
    stream.append(old, end);
    const typename Traits::Factors factors(params, tile.kv_head);
    WarpRows<Traits> rows(params, tile, factors, old + params.q_offset);
    stream.run(old, rows);
    rows.store(found(warp));
    work.go_on();
  }
  if (!params.new_tokens.advance) return;
  // Every thread has read the lengths. The last block to come here adds the new tokens to them.
  __syncthreads();
  if (threadIdx.x == 0 && decode::take_ticket(params.tickets, gridDim.x) == gridDim.x - 1) {
#pragma unroll 1
    for (int i = 0; i < params.cache.batch; ++i)
      atomicAdd(params.cache.seqlens + i, decode::new_tokens(params.new_tokens, i));
  }
}

}  // namespace longgen::sm90
