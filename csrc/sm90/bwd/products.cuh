// The five matrix products of a query tile, as a math warpgroup issues them; each is a group of its
// own.
#pragma once

#include "arch/sm90/wgmma.cuh"
#include "sm90/bwd/traits.cuh"

namespace longgen::sm90 {

// D = A B^T over head_dim: the warpgroup's keys, K or V, by all queries, Q or dO.
template <typename Traits, int kSize>
__device__ __forceinline__ void issue_transposed(float (&d)[kSize], uint32_t keys, uint32_t queries,
                                                 int warpgroup) {
  using Product = Wgmma<Traits::kBlockM, typename Traits::T>;
  // Opaque, or the compiler would compute all descriptors ahead of the branches before this, and
  // keep them in registers of its own.
  asm volatile("" : "+r"(keys));
  const uint64_t a = operand(keys + warpgroup * 64 * 128);
  const uint64_t b = operand(queries);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
    const uint64_t a_k = advance(a, k / 4 * Traits::kKeyPanelBytes + k % 4 * 32);
    const uint64_t b_k = advance(b, k / 4 * Traits::kQueryPanelBytes + k % 4 * 32);
    if (k == 0) {
      Product::template ss_first<false>(d, a_k, b_k);
    } else {
      Product::template ss<false, false>(d, a_k, b_k, true);
    }
  }
  wgmma_commit();
}

// dV += P^T dO, over queries; dO is N-major: 16 queries are two groups of 8 rows of 128 bytes.
template <typename Traits, int kSize, int kWeights>
__device__ __forceinline__ void issue_value_gradient(float (&dv)[kSize],
                                                     const uint32_t (&p)[kWeights], uint32_t dout) {
  const uint64_t b = operand(dout, Traits::kQueryPanelBytes);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Traits::kBlockM / 16; ++k) {
    const uint32_t fragment[4] = {p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3]};
    Wgmma<Traits::kHeadDim, typename Traits::T>::template rs<true>(dv, fragment,
                                                                   advance(b, k * 2048), true);
  }
  wgmma_commit();
}

// dK += dS^T Q, likewise; dS, queries by keys, is M-major.
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
