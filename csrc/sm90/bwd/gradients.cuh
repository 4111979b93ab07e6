// dK and dV of a key tile: rows of the tensors, or the sums of a chunk.
#pragma once

#include "sm90/bwd/rows.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// Where row `k_row` of an item's head lies in dK and dV.
template <int kHeadDim>
__device__ __forceinline__ int64_t gradient_offset(const AttentionBwdParams& params,
                                                   const Item& item, int k_row) {
  const int64_t row = static_cast<int64_t>(item.sequence.batch) * params.seqlen_k + k_row;
  return (row * params.kv_heads + item.kv_head) * kHeadDim;
}

// Writes what a warpgroup has of both; a thread's first row in the tile is `key_row`.
template <typename Traits, int kSize>
__device__ __forceinline__ void store_gradients(const AttentionBwdParams& params, const Item& item,
                                                const KeyRow* rows, int warpgroup, int key_row,
                                                const float (&dk)[kSize],
                                                const float (&dv)[kSize]) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim;
  if (item.partial >= 0) {
    float* const sums =
        params.partials + static_cast<int64_t>(item.partial) * 2 * Traits::kBlockN * kHeadDim;
    const int first = (key_row & -16) * kHeadDim;  // a warp's 16 rows
    store_accumulators(sums + first, dk);
    store_accumulators(sums + Traits::kBlockN * kHeadDim + first, dv);
    return;
  }
  T* dk_rows[2];
  T* dv_rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = rows[key_row + 8 * half].row;
    const int64_t at = gradient_offset<kHeadDim>(params, item, row);
    dk_rows[half] = row < 0 ? nullptr : static_cast<T*>(params.dk) + at;
    dv_rows[half] = row < 0 ? nullptr : static_cast<T*>(params.dv) + at;
  }
  store_rows(dk_rows[0], dk_rows[1], dk, params.softmax_scale);
  store_rows(dv_rows[0], dv_rows[1], dv, 1.f);
}

}  // namespace longgen::sm90
