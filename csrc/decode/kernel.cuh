// Split-KV attention to a cache, with the new tokens' append and the splits' combination in it.
//
// A thread block has one tile of query rows and one split of a KV head's chunks. Its warps stream
// chunks independently and merge at the end; the last block of a row tile to finish merges the
// splits. Reading the cache is what takes time: see docs/kv-cache.md.
#pragma once

#include "arch/sm90/dependent_launch.cuh"
#include "decode/append.cuh"
#include "decode/combine.cuh"
#include "decode/shares.cuh"
#include "decode/stream.cuh"

namespace longgen::decode {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Traits::T;
  extern __shared__ __align__(16) char dynamic_shared[];
  auto* const found = reinterpret_cast<typename Traits::Found*>(dynamic_shared);

  const int split = blockIdx.x, warp = uniform(threadIdx.x / 32);
  const Tile tile = tile_of_block<Traits::kRows>(params);
  const int sequence = tile.sequence, kv_head = tile.kv_head;
  sm90::let_next_kernel_start();
  sm90::wait_for_previous_kernels();
  // Another block may make it longer below, when all have read it.
  const int seqlen = uniform(__ldcg(params.cache.seqlens + sequence));
  const int end = uniform(seqlen + new_tokens(params.new_tokens, sequence));
  const int p0 = seqlen + params.q_offset;
  const CacheSlots slots(params.cache, kv_head, p0 + tile.token(params, 0),
                         p0 + tile.token(params, tile.rows - 1), end);
  const Share share = Shares::of(slots.count(), params.splits).of_block(split);

  // The new tokens that are in this block's chunks are written before they are read. Blocks of
  // other row tiles write the same.
  bool wrote = false;
  for (int i = 0; i < end - seqlen; ++i) {
    const int chunk = slots.chunk_of(seqlen + i);
    if (chunk < share.first || chunk >= share.last) continue;
    wrote = true;
    if (i % Traits::kWarps == warp)
      write_token<T, T, Traits::kHeadDim>(params.cache, params.scales, params.new_tokens, sequence,
                                          kv_head, i, slots.slot(seqlen + i, end));
  }
  if (wrote) __syncthreads();

  const typename Traits::Factors factors(params, kv_head);
  WarpRows<Traits> rows(params, tile, factors, p0);
  WarpStream<Traits>(params, slots, tile, rows).run(share.first + warp, share.last);
  rows.store(found[warp]);
  __syncthreads();
  // Every thread has used the length that it read. The last block of the sequence to come here
  // replaces it.
  if (params.new_tokens.advance && threadIdx.x == Traits::kThreads - 1 &&
      counts_last(params.tickets + sequence, gridDim.x * gridDim.y))
    params.cache.seqlens[sequence] = end;

  merge_splits<Traits>(params, tile, factors, split, params.splits,
                       [&](int w) -> const typename Traits::Found& { return found[w]; });
}

}  // namespace longgen::decode
