// Matrix products of a math warpgroup, as the backward kernels issue them; each is a group of its
// own. Operands are addresses in shared memory, of tiles in panels of 64 columns.
#pragma once

#include "arch/sm90/wgmma.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// D = A B^T over head_dim: 64 rows, the first of them at `a`, by kColumns; a panel of each operand
// has so many bytes.
template <typename T, int kColumns, int kHeadDim, uint32_t kPanelA, uint32_t kPanelB>
__device__ __forceinline__ void issue_transposed(float (&d)[kColumns / 2], uint32_t a, uint32_t b) {
  const uint64_t row = operand(a);
  const uint64_t column = operand(b);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint64_t row_k = advance(row, k / 4 * kPanelA + k % 4 * 32);
    const uint64_t column_k = advance(column, k / 4 * kPanelB + k % 4 * 32);
    if (k == 0) {
      Wgmma<kColumns, T>::template ss_first<false>(d, row_k, column_k);
    } else {
      Wgmma<kColumns, T>::template ss<false, false>(d, row_k, column_k, true);
    }
  }
  wgmma_commit();
}

// D += A B over kRows rows of B, of head_dim columns: A is in registers, B N-major: 16 rows are two
// groups of 8 of 128 bytes.
template <typename T, int kHeadDim, int kRows, uint32_t kPanelB>
__device__ __forceinline__ void issue_from_registers(float (&d)[kHeadDim / 2],
                                                     const uint32_t (&a)[kRows / 4], uint32_t b) {
  const uint64_t rows = operand(b, kPanelB);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    const uint32_t fragment[4] = {a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]};
    Wgmma<kHeadDim, T>::template rs<true>(d, fragment, advance(rows, k * 2048), true);
  }
  wgmma_commit();
}

// dK += dS^T Q over queries; dS, queries by keys, is M-major, Q N-major.
template <typename Traits, int kSize>
__device__ __forceinline__ void issue_key_gradient(float (&dk)[kSize], uint32_t ds,
                                                   uint32_t queries, int warpgroup) {
  const uint64_t a = operand(ds + warpgroup * Traits::kQueryPanelBytes);
  const uint64_t b = operand(queries, Traits::kQueryPanelBytes);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Traits::kBlockM / 16; ++k)
    Wgmma<Traits::kHeadDim, typename Traits::T>::template ss<true, true>(
        dk, advance(a, k * 2048), advance(b, k * 2048), true);
  wgmma_commit();
}

// dQ = dS K: the warpgroup's part, over kKeys keys from `first` on; K is N-major.
template <typename Traits, int kKeys, int kSize>
__device__ __forceinline__ void issue_query_gradient(float (&dq)[kSize], uint32_t ds, uint32_t keys,
                                                     int first, int warpgroup) {
  using Product = Wgmma<64, typename Traits::T>;
  const DqPart<Traits::kHeadDim> part(warpgroup);
  const uint64_t a = operand(ds + first / 64 * Traits::kQueryPanelBytes + part.row * 128);
  const uint64_t b = operand(keys + part.column / 64 * Traits::kKeyPanelBytes + first * 128);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    const uint64_t a_k = advance(a, k / 4 * Traits::kQueryPanelBytes + k % 4 * 32);
    const uint64_t b_k = advance(b, k * 2048);
    if (k == 0) {
      Product::template ss_first<true>(dq, a_k, b_k);
    } else {
      Product::template ss<false, true>(dq, a_k, b_k, true);
    }
  }
  wgmma_commit();
}

}  // namespace longgen::sm90
