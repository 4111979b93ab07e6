// Host side of the Hopper backward pass: tensor maps, grids, launches.
#pragma once

#include <algorithm>

#include "cuda_check.h"
#include "sm90/bwd/kernel.cuh"
#include "sm90/bwd/passes.cuh"
#include "sm90/bwd/plan.h"
#include "sm90/tensor_map.h"

namespace longgen::sm90 {

template <typename T, int kHeadDim>
void launch_attn_bwd(AttentionBwdParams params) {
  using Traits = BwdTraits<T, kHeadDim>;
  params.plan = make_plan(params);
  params.scale_log2 = params.softmax_scale * 1.4426950408889634f;
  const int batch = params.cu_seqlens_q != nullptr ? 1 : params.batch;
  if (batch == 0 || params.seqlen_q == 0 || params.seqlen_k == 0) return;

  const auto map = [&](const void* data, const OutStrides& strides) {
    return tensor_map(data, params.dtype, {kHeadDim, params.seqlen_q, params.q_heads, batch},
                      {strides.seqlen, strides.head, strides.batch}, Traits::kBlockM);
  };
  const CUtensorMap q = map(params.q, params.q_strides);
  const CUtensorMap dout = map(params.dout, params.dout_strides);

  const dim3 query_grid(params.plan.q_tiles, params.q_heads, batch);
  bwd_rows_kernel<T, kHeadDim><<<query_grid, 256, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("bwd_rows_kernel");

  const auto kernel = attn_bwd_kernel<Traits>;
  // At each launch: the attribute belongs to a device, and which one is current may change.
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          Traits::kSharedBytes));
  kernel<<<std::min(params.plan.items, params.multiprocessors), Traits::kThreads,
           Traits::kSharedBytes, params.stream>>>(params, q, dout);
  LONGGEN_CHECK_LAUNCH("attn_bwd_kernel");

  bwd_dq_kernel<T, kHeadDim><<<query_grid, kHeadDim * 2, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("bwd_dq_kernel");
  if (params.plan.chunks > 1) {
    const dim3 tile_grid(params.plan.global_slots, params.kv_heads, batch);
    bwd_chunks_kernel<Traits><<<tile_grid, 256, 0, params.stream>>>(params);
    LONGGEN_CHECK_LAUNCH("bwd_chunks_kernel");
  }
}

}  // namespace longgen::sm90
