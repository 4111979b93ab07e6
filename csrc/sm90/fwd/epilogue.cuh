// What is left of a work item when its last matrix product is done: normalise its rows and write
// them, without a barrier, a fence or a branch.
#pragma once

#include "arch/pack.cuh"
#include "arch/sm90/shared_copy.cuh"
#include "attention/softmax.cuh"
#include "params.h"
#include "sm90/fwd/traits.cuh"

namespace longgen::sm90 {

// Writes the 16 rows of a warp, of which the first is row `warp_row` of the tile, through `staged`:
// room for 16 rows that only this warp uses, so that it waits for no other, and that the copy
// engine does not touch, so that no fence is needed.
template <typename Traits>
__device__ __forceinline__ void write_rows(const AttentionFwdParams& params, const ItemInfo work,
                                           typename Traits::T* staged, int warp_row,
                                           const OnlineSoftmax& softmax,
                                           const float (&o)[Traits::kHeadDim / 2]) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes in a row
  constexpr int kRowsAtOnce = 32 / kChunks;      // that the warp writes with one instruction
  static_assert(kChunks == 8, "the swizzle is that of rows of 128 bytes");
  const int lane = threadIdx.x % 32;
  const int q_row = work.p_tile + warp_row - work.q_start;  // of the warp's first row
  const auto exists = [&](int row) { return row >= 0 && row < work.q_len; };

  uint32_t rows[2][kChunks];  // this thread's part of each chunk of its two rows
  const int lse_row = q_row + lane / 4;
  float* const lse =
      params.lse +
      (static_cast<int64_t>(work.batch) * params.q_heads + work.head) * params.seqlen_q +
      work.q_row0 + lse_row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(softmax.sum[half]);
    const bool seen = sum != 0.f;  // NaN is not 0: it stays NaN
    const float scale = fast_reciprocal(sum);
    const float log_sum = (softmax.reference[half] + fast_log2(sum)) * 0.6931471805599453f;
    if (lane % 4 == 0 && exists(lse_row + 8 * half)) lse[8 * half] = seen ? log_sum : -INFINITY;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int i = 4 * chunk + 2 * half;
      rows[half][chunk] = seen ? pack<T>(o[i] * scale, o[i + 1] * scale) : 0u;
    }
  }

  // 16 bytes of a row, so that those of eight rows, and a row's eight, fall into different banks.
  const auto place = [&](int row, int chunk) { return staged + row * 64 + (chunk ^ row % 8) * 8; };
  __syncwarp();  // what was staged before has been read
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk += 2)
    store_matrices(shared_address(place(lane % 16, chunk + lane / 16)), rows[0][chunk],
                   rows[1][chunk], rows[0][chunk + 1], rows[1][chunk + 1]);
  __syncwarp();
  uint4 written[16 / kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < 16 / kRowsAtOnce; ++i)
    written[i] =
        *reinterpret_cast<const uint4*>(place(i * kRowsAtOnce + lane / kChunks, lane % kChunks));
  const int row = q_row + lane / kChunks;
  const int64_t row_stride = static_cast<int64_t>(params.q_heads) * Traits::kHeadDim;
  T* out = static_cast<T*>(params.out) + work.head * Traits::kHeadDim + lane % kChunks * 8 +
           (static_cast<int64_t>(work.batch) * params.seqlen_q + work.q_row0 + row) * row_stride;
#pragma unroll
  for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    if (exists(row + i * kRowsAtOnce)) *reinterpret_cast<uint4*>(out) = written[i];
    out += kRowsAtOnce * row_stride;
  }
}

}  // namespace longgen::sm90
