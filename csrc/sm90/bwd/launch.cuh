// Host side of the Hopper backward pass: tensor maps, grids, launches.
#pragma once

#include <algorithm>

#include "cuda_check.h"
#include "sm90/bwd/dq_kernel.cuh"
#include "sm90/bwd/kernel.cuh"
#include "sm90/bwd/passes.cuh"
#include "sm90/bwd/plan.h"
#include "sm90/tensor_map.h"

namespace longgen::sm90 {

// One persistent block a multiprocessor, as far as there are items.
template <typename Traits, typename... Arguments>
void launch_persistent(void (*kernel)(Arguments...), int items, const AttentionBwdParams& params,
                       const Arguments&... arguments) {
  // At each launch: the attribute belongs to a device, and which one is current may change.
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          Traits::kSharedBytes));
  kernel<<<std::min(items, params.multiprocessors), Traits::kThreads, Traits::kSharedBytes,
           params.stream>>>(arguments...);
}

template <typename T, int kHeadDim>
void launch_attn_bwd(AttentionBwdParams params) {
  params.plan = make_plan(params);
  params.scale_log2 = params.softmax_scale * 1.4426950408889634f;
  const BwdPlan& plan = params.plan;
  const int batch = params.cu_seqlens_q != nullptr ? 1 : params.batch;
  if (batch == 0 || params.seqlen_q == 0 || params.seqlen_k == 0) return;

  // Before the tensor maps: see tensor_map.
  const dim3 query_grid(plan.q_tiles, params.q_heads, batch);
  bwd_rows_kernel<T, kHeadDim><<<query_grid, 256, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("bwd_rows_kernel");

  const auto map = [&](const void* data, int rows, int heads, const OutStrides& strides,
                       int box_rows) {
    return tensor_map(data, params.dtype, {kHeadDim, rows, heads, batch},
                      {strides.seqlen, strides.head, strides.batch}, box_rows);
  };
  constexpr int kRows = query_rows(kHeadDim);
  const CUtensorMap q = map(params.q, params.seqlen_q, params.q_heads, params.q_strides, kRows);
  const CUtensorMap dout =
      map(params.dout, params.seqlen_q, params.q_heads, params.dout_strides, kRows);

  const int box = 1 << plan.log2_box;
  const CUtensorMap k = map(params.k, params.seqlen_k, params.kv_heads, params.k_strides, box);
  const CUtensorMap v = map(params.v, params.seqlen_k, params.kv_heads, params.v_strides, box);

  if (params.deterministic) {
    using KeyTraits = BwdTraits<T, kHeadDim, false>;
    launch_persistent<KeyTraits>(attn_bwd_kernel<KeyTraits>, plan.items, params, params, q, dout, k,
                                 v);
    LONGGEN_CHECK_LAUNCH("attn_bwd_kernel");
    using RowTraits = DqTraits<T, kHeadDim>;
    launch_persistent<RowTraits>(bwd_dq_rows_kernel<RowTraits>, plan.row_items, params, params, q,
                                 dout, k, v);
    LONGGEN_CHECK_LAUNCH("bwd_dq_rows_kernel");
  } else {
    using Traits = BwdTraits<T, kHeadDim, true>;
    launch_persistent<Traits>(attn_bwd_kernel<Traits>, plan.items, params, params, q, dout, k, v);
    LONGGEN_CHECK_LAUNCH("attn_bwd_kernel");
    bwd_dq_kernel<T, kHeadDim><<<query_grid, 256, 0, params.stream>>>(params);
    LONGGEN_CHECK_LAUNCH("bwd_dq_kernel");
  }
  if (plan.chunks > 1) {
    const dim3 tile_grid(plan.global_slots, params.kv_heads, batch);
    bwd_chunks_kernel<T, kHeadDim><<<tile_grid, 256, 0, params.stream>>>(params);
    LONGGEN_CHECK_LAUNCH("bwd_chunks_kernel");
  }
}

}  // namespace longgen::sm90
