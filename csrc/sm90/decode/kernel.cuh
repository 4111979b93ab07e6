// Hopper's decode kernel: split-KV attention to a cache, with the new tokens' append and the
// splits' combination in it.
//
// A thread block has one tile of query rows and one split of a KV head's chunks, of which each warp
// streams its own. The splits of a tile are the blocks of a cluster, and merge through their shared
// memory; where there are too many for that, through global memory.
#pragma once

#include "arch/sm90/cluster.cuh"
#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "decode/combine.cuh"
#include "sm90/decode/halves.cuh"
#include "sm90/decode/lengths.cuh"
#include "sm90/decode/seats.cuh"
#include "sm90/decode/slices.cuh"
#include "sm90/decode/stream.cuh"

namespace longgen::sm90 {

// Says how much the other blocks, and this one, will write here. Once, before the cluster's
// barrier.
template <typename Traits>
__device__ __forceinline__ void expect_parts(const decode::Tile& tile, int split, int splits,
                                             typename Traits::Shared& shared) {
  const Slices slices = Slices::of(tile.rows * Traits::kHeadDim / 2, splits);
  shared.merged.init(1);
  fence_barrier_init();
  shared.merged.arrive_and_expect(splits * (slices.size(split) + tile.rows) * sizeof(float2));
}

// Merges what the warps of this block have found, sends it to the blocks that merge it further, and
// does that with this block's slice.
template <typename Traits, typename OfWarp>
__device__ __forceinline__ void merge_through_cluster(const DecodeParams& params,
                                                      const decode::Tile& tile,
                                                      const typename Traits::Factors& factors,
                                                      int split, typename Traits::Shared& shared,
                                                      OfWarp found) {
  using Part = decode::Part<Traits::kHeadDim, 2>;
  constexpr int kPairs = Traits::kHeadDim / 2;
  const int splits = params.splits;
  const Slices slices = Slices::of(tile.rows * kPairs, splits);
  cluster_wait();
  decode::for_parts<Part>(tile, decode::BlockTeam<Traits::kThreads>(), [&](int row, int column) {
    const Part part = decode::merge<Traits::kWarps>(
        Traits::kWarps, [&](int w) { return decode::part_of<Part>(found(w), row, column); });
    const int i = row * kPairs + column / 2, owner = slices.owner(i);
    store_remote(shared.part_out + slices.first(split) + i - slices.first(owner), shared.merged,
                 owner, {part.out(0), part.out(1)});
    if (column != 0) return;
#pragma unroll 1
    for (int rank = 0; rank < splits; ++rank)
      store_remote(shared.part_weights[split] + row, shared.merged, rank, {part.offset, part.sum});
  });
  shared.merged.wait(0);
#pragma unroll 1
  for (int i = threadIdx.x; i < slices.size(split); i += Traits::kThreads) {
    const int pair = slices.first(split) + i, row = pair / kPairs, column = pair % kPairs * 2;
    const Part all = decode::merge<Traits::kMaxCluster>(splits, [&](int block) {
      const float2 weights = shared.part_weights[block][row];
      const float2 out = shared.part_out[slices.first(block) + i];
      return Part{weights.x, weights.y, {{out.x, out.y}}};
    });
    decode::store_result<typename Traits::T>(params, tile, row, column, all, factors.out);
  }
}

// What a block does: one of the splits of a tile, of the sequence's tile of that number.
struct Assignment {
  int sequence, number, split, splits;
};

// Blocks are a grid of splits, tiles and sequences. Or there is a row of items: first one for each
// tile that is whole, then those of tiles with splits. Who has a seat does `item`, others the item
// of their number.
template <typename Traits>
__device__ __forceinline__ Assignment assignment(const DecodeParams& params, int item) {
  if (Traits::kPlain) return {int(blockIdx.z), int(blockIdx.y), 0, 1};
  if (params.seats == 0) item = blockIdx.x;
  if (params.seats == 0 && params.whole_tiles == 0)
    return {int(blockIdx.z), int(blockIdx.y), item, params.splits};
  const int tiles = params.cache.kv_heads * params.row_tiles;  // of a sequence
  int index = item, split = 0, splits = 1;
  if (item >= params.whole_tiles) {
    const int behind = item - params.whole_tiles;
    splits = params.splits;
    const int before = unsigned(behind) / unsigned(splits);
    index = params.whole_tiles + before;
    split = behind - before * splits;
  }
  const int sequence = unsigned(index) / unsigned(tiles);
  return {sequence, index - sequence * tiles, split, splits};
}

// How many blocks have a split of one of the sequence's tiles.
template <typename Traits>
__device__ __forceinline__ int blocks_of_sequence(const DecodeParams& params, int sequence) {
  const int tiles = params.cache.kv_heads * params.row_tiles;
  if (Traits::kPlain) return tiles;
  const int whole = min(max(params.whole_tiles - sequence * tiles, 0), tiles);
  return whole + (tiles - whole) * params.splits;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ CacheMaps maps) {
  extern __shared__ __align__(1024) char dynamic_shared[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(dynamic_shared);

  const int warp = decode::uniform(threadIdx.x / 32);
  if (!Traits::kPlain && !Traits::kByHalves && params.seats > 0 &&
      !take_seat<Traits::kBlocks>(params, shared.item))
    return;
  // The length before the kernels ahead have ended is most often the one after, and what follows
  // from it is found while they end; not so with pages, which they may move without a trace.
  // Another block may make the sequence longer below, when all have read its length.
  const bool paged = params.cache.block_table != nullptr;
  Lengths lengths{}, now;
  int guess = 0;
  if (Traits::kByHalves) {
    // Blocks take items about in the order in which they come: the length of the sequence that is
    // likely to be the one is read while the item is asked for.
    const HalfItems items(params);
    uint32_t answer = 0;
    if (threadIdx.x == 0) answer = items.ask();
    guess = assignment<Traits>(params, min(int(blockIdx.x), params.items - 1)).sequence;
    if (!paged) lengths = read_lengths(params, guess);
    if (threadIdx.x == 0) shared.item = items.item(answer);
    __syncthreads();
    if (shared.item < 0) {
      if (threadIdx.x == 0) items.end_turn();
      __syncthreads();
      return;  // and so lets the next kernel start
    }
  }
  // Read in any case: behind a condition it would cost registers, and there are none to spare.
  const Assignment assigned = assignment<Traits>(params, decode::uniform(shared.item));
  const int split = assigned.split, splits = assigned.splits;
  if (!Traits::kPlain && threadIdx.x == 0)
    shared.split = {split, splits};  // so that they take up no registers
  const decode::Tile tile =
      decode::tile_of<Traits::kRows>(params, assigned.sequence, assigned.number);
  if (!paged && !(Traits::kByHalves && tile.sequence == guess))
    lengths = read_lengths(params, tile.sequence);
  BulkStream<Traits>::set_up(maps, shared, warp);
  const bool clustered = Traits::kMaxCluster > 1 && params.clustered;
  if (clustered) {
    if (threadIdx.x == 0) expect_parts<Traits>(tile, split, splits, shared);
    cluster_arrive();
  }
  if (!Traits::kByHalves) let_next_kernel_start();
  if (paged) {
    wait_for_previous_kernels();
    lengths = read_lengths(params, tile.sequence);
  }
  now = lengths;
  CacheSlots slots(params.cache);
  BulkStream<Traits> stream(params, maps, slots, tile, shared);
  bool first = true;
#pragma unroll 1
  do {
    lengths = now;
    const int p0 = lengths.old + params.q_offset, end = lengths.end(params.new_tokens);
    slots.visit(tile.kv_head, p0 + tile.token(params, 0), p0 + tile.token(params, tile.rows - 1),
                end, lengths.old);
    const auto shares = decode::Shares::of(stream.pairs_of(slots), splits);
    stream.prepare(tile, shares.of_block(split), lengths.old < end);
    if (first) {
      const Inputs<Traits, Traits::kWarps> inputs(params, tile, warp);
      wait_for_previous_kernels();
      now = read_lengths(params, tile.sequence);
      inputs.load(shared.inputs[0]);
    }
    first = false;
    stream.start_keys();
    if (now != lengths) {
      stream.start_values();
      stream.drop();
    }
  } while (now != lengths);
  const typename Traits::Factors factors(params, tile.kv_head);
  wait_for_copies();
  stream.start_values();
  if (Traits::kByHalves &&
      threadIdx.x == Traits::kThreads - 1) {  // while the first keys are on their way
    HalfItems(params).end_turn();
    let_next_kernel_start();
  }
  __syncthreads();
  stream.append(lengths.old, lengths.end(params.new_tokens));
  const int old = decode::uniform(lengths.old);
  WarpRows<Traits> rows(params, tile, factors, old + params.q_offset);
  stream.run(old, rows, [](int) {});
  const auto found = [&](int w) -> typename Traits::Found& {
    return *reinterpret_cast<typename Traits::Found*>(shared.ring[w * Traits::kStages]);
  };
  // Every thread has read the length. The last block of the sequence to come here adds the new
  // tokens to it, in the end: meanwhile the answer is on its way.
  const uint32_t blocks = blocks_of_sequence<Traits>(params, tile.sequence);
  uint32_t ticket = ~0u;
  if (params.new_tokens.advance && threadIdx.x == Traits::kThreads - 1)
    ticket = decode::take_ticket(params.tickets + tile.sequence, blocks);
  rows.store(found(warp));
  __syncthreads();
  const int2 again = Traits::kPlain ? int2{0, 1} : shared.split;
  if (clustered) {
    merge_through_cluster<Traits>(params, tile, factors, again.x, shared, found);
  } else {
    decode::merge_splits<Traits>(params, tile, factors, again.x, again.y, found);
  }
  if (ticket == blocks - 1)
    atomicAdd(params.cache.seqlens + tile.sequence,
              decode::new_tokens(params.new_tokens, tile.sequence));
}

}  // namespace longgen::sm90
