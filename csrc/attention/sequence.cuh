// Which rows of the tensors belong together: one sequence, dense or packed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace longgen {

struct Sequence {
  int batch;          // the tensor's; 0 when packed
  int index;          // in the packed batch; 0 when not packed
  int q_row0, q_len;  // first row in the tensor and number of rows
  int k_row0, k_len;
  int q_start, k_start;  // positions of those rows
};

// Sequence `batch` of tensors that are not packed.
template <typename Params>
__host__ __device__ __forceinline__ Sequence dense_sequence(const Params& params, int batch) {
  return {batch, 0, 0, params.seqlen_q, 0, params.seqlen_k, params.q_start, params.k_start};
}

// The packed sequence that owns `slot`, which becomes the number of its tile.
//
// Sequence b owns the slots from cu[b] / tile_rows + slack * b, where cu are the offsets of its
// queries (kByQuery) or keys: enough for all its tiles, without any metadata. Rows past the last
// sequence form one more, without partners. Offsets are clipped, so that wrong ones cannot reach
// outside.
template <bool kByQuery, typename Params>
__host__ __device__ __forceinline__ Sequence packed_sequence(const Params& params, int tile_rows,
                                                             int slack, int& slot) {
  const auto clipped = [](int x, int total) { return x < 0 ? 0 : x < total ? x : total; };
  const int32_t* cu = kByQuery ? params.cu_seqlens_q : params.cu_seqlens_k;
  const int total = kByQuery ? params.seqlen_q : params.seqlen_k;
  int lo = 0, hi = params.batch;
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (clipped(cu[mid], total) / tile_rows + slack * mid <= slot) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  slot -= clipped(cu[lo], total) / tile_rows + slack * lo;
  const bool real = lo < params.batch;
  Sequence one{};
  one.index = lo;
  one.q_row0 = clipped(params.cu_seqlens_q[lo], params.seqlen_q);
  one.k_row0 = clipped(params.cu_seqlens_k[lo], params.seqlen_k);
  int q_end = kByQuery ? params.seqlen_q : one.q_row0;
  int k_end = kByQuery ? one.k_row0 : params.seqlen_k;
  if (real) {
    q_end = clipped(params.cu_seqlens_q[lo + 1], params.seqlen_q);
    k_end = clipped(params.cu_seqlens_k[lo + 1], params.seqlen_k);
  }
  one.q_len = q_end > one.q_row0 ? q_end - one.q_row0 : 0;
  one.k_len = k_end > one.k_row0 ? k_end - one.k_row0 : 0;
  one.k_start = real && params.k_starts != nullptr ? params.k_starts[lo] : 0;
  one.q_start = one.k_start + one.k_len - one.q_len;
  if (real && params.q_starts != nullptr) one.q_start = params.q_starts[lo];
  return one;
}

}  // namespace longgen
