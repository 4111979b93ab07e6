// Split-KV attention to a cache, with the new tokens' append and the splits' combination in it.
//
// A thread block has one tile of query rows and one split of a KV head's chunks. Its four warps
// stream chunks independently and merge at the end. Then the blocks of a row tile, as a cluster,
// merge the splits; or the last of them to finish does. Reading the cache is what takes time: see
// docs/kv-cache.md.
#pragma once

#include "decode/append.cuh"
#include "decode/combine.cuh"
#include "decode/stream.cuh"

namespace longgen::decode {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Traits::T;
  using Fixed = typename Traits::Fixed;
  using Stage = typename Traits::Stage;
  extern __shared__ __align__(16) char shared[];
  Fixed& fixed = *reinterpret_cast<Fixed*>(shared);
  Stage* const stages = reinterpret_cast<Stage*>(shared + sizeof(Fixed));
  static_assert(sizeof(Fixed) % 16 == 0, "stages are copied to in 16 bytes");

  const int split = blockIdx.x, sequence = blockIdx.z;
  const int kv_head = blockIdx.y / params.row_tiles, row_tile = blockIdx.y % params.row_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_row = row_tile * Traits::kRows;
  const int rows = min(params.n * params.group - first_row, Traits::kRows);
  const Tile tile{
      sequence, kv_head, first_row, rows,
      (int64_t(sequence) * params.cache.kv_heads + kv_head) * params.row_tiles + row_tile};
  // Another block may make it longer below, when all have read it.
  const int seqlen = __ldcg(params.cache.seqlens + sequence);

  // Q, and zeros in the rows that there are none for.
  constexpr int kPieces = Traits::kHeadDim / 8;  // of 16 bytes
  const T* const q = static_cast<const T*>(params.q) + sequence * params.q_strides.batch;
  for (int i = threadIdx.x; i < Traits::kRows * kPieces; i += Traits::kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const T* const from = q + tile.token(params, row) * params.q_strides.seqlen +
                          tile.head(params, row) * params.q_strides.head + column;
    sm80::copy_16_bytes(sm80::shared_address(fixed.q + row * Traits::kStride + column),
                        row < rows ? from : q, row < rows);
  }
  sm80::commit_copies();

  const int end = seqlen + new_tokens(params.new_tokens, sequence);
  const int p0 = seqlen + params.q_offset;
  const int p_first = p0 + tile.token(params, 0);
  const int p_last = p0 + tile.token(params, rows - 1);
  const CacheSlots slots(params.cache, kv_head, p_first, p_last, end);
  const int each = slots.count() / params.splits, rest = slots.count() % params.splits;
  const int first = split * each + min(split, rest);
  const int last = first + each + (split < rest ? 1 : 0);

  // The new tokens that are in this block's chunks are written before they are read. Blocks of
  // other row tiles write the same.
  bool wrote = false;
  for (int i = 0; i < end - seqlen; ++i) {
    const int chunk = slots.chunk_of(seqlen + i);
    if (chunk < first || chunk >= last) continue;
    wrote = true;
    if (i % Traits::kWarps == warp)
      write_token<T, Traits::kHeadDim>(params.cache, params.new_tokens, sequence, kv_head, i,
                                       slots.slot(seqlen + i, end));
  }
  if (wrote) __syncthreads();

  Stage* const own_stages = stages + warp * params.stages;
  WarpStream<Traits> stream(params, slots, sequence, kv_head, fixed.q, fixed.seen[warp],
                            own_stages);
  stream.start(first + warp, last);
  int p[Traits::kRowGroups][2];
#pragma unroll
  for (int g = 0; g < Traits::kRowGroups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(g * 16 + half * 8 + lane / 4, rows - 1);
      p[g][half] = p0 + tile.token(params, row);
    }
  }
  // Q's copies are older than those of the stages.
  if (params.stages == 2)
    sm80::wait_for_copies<1>();
  else
    sm80::wait_for_copies<2>();
  __syncthreads();
  // Every thread has used the length that it read. While the copies are on their way the last block
  // of the sequence to come here replaces it.
  if (params.new_tokens.advance && threadIdx.x == 0) {
    const unsigned blocks = gridDim.x * gridDim.y;
    if (atomicInc(params.tickets + sequence, blocks - 1) == blocks - 1)
      params.cache.seqlens[sequence] = end;
  }
  __syncwarp();
  stream.run(p, p_first, p_last);
  stream.store(reinterpret_cast<float*>(own_stages), fixed.maximum[warp], fixed.sum[warp]);
  __syncthreads();

  if (params.in_cluster) {
    // Q and the first warp's output have been read where the parts go.
    float* const part = reinterpret_cast<float*>(stages);
    float* const part_lse = reinterpret_cast<float*>(fixed.q);
    merge_warps<Traits>(params, tile, fixed, stages, part, Traits::kOutStride, part_lse);
    merge_cluster<Traits>(params, tile, split, part, part_lse);
  } else {
    const int64_t part = (tile.index * params.splits + split) * Traits::kRows;
    merge_warps<Traits>(params, tile, fixed, stages, params.part_out + part * Traits::kHeadDim,
                        Traits::kHeadDim, params.part_lse + part);
    if (params.splits > 1) {
      if (!is_last(params.tickets + params.cache.batch + tile.index, params.splits)) return;
      merge_splits<Traits>(params, tile, reinterpret_cast<float*>(stages));
    }
  }
}

}  // namespace longgen::decode
