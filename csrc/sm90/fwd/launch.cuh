// Host side of the Hopper forward kernel: tensor maps, grid, launch.
#pragma once

#include <algorithm>

#include "cuda_check.h"
#include "sm90/fwd/kernel.cuh"
#include "sm90/tensor_map.h"

namespace longgen::sm90 {

template <typename T, int kHeadDim>
void launch_attn_fwd(AttentionFwdParams params) {
  using Traits = FwdTraits<T, kHeadDim>;
  const bool packed = params.cu_seqlens_q != nullptr;
  params.scale_log2 = params.softmax_scale * 1.4426950408889634f;
  params.group = params.q_heads / params.kv_heads;
  // A key tile is made of boxes; strided blocks and masks may need smaller ones than a tile.
  params.log2_box = 7;
  const bool has_blocks = params.pattern.stride != 0 || params.pattern.mask_rows != nullptr;
  if (has_blocks) params.log2_box = std::min(params.log2_box, params.pattern.log2_block);
  const bool paged = params.block_table != nullptr;
  if (paged) {
    params.log2_page = 0;
    while ((1 << params.log2_page) < params.page_size) ++params.log2_page;
    params.log2_box = std::min(params.log2_box, params.log2_page);
  }
  const int box = 1 << params.log2_box;

  const auto kernel = attn_fwd_kernel<Traits>;
  // At each launch: the attribute belongs to a device, and which one is current may change.
  // Before the tensor maps: see tensor_map.
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          Traits::kSharedBytes));

  const int batch = packed ? 1 : params.batch;
  const auto map = [&](const void* data, int rows, int heads, int count, const OutStrides& strides,
                       int box_rows) {
    return tensor_map(data, params.dtype, {kHeadDim, rows, heads, count},
                      {strides.seqlen, strides.head, strides.batch}, box_rows);
  };
  const int k_rows = paged ? params.page_size : params.seqlen_k;
  const int k_count = paged ? params.pages : batch;
  const CUtensorMap q =
      map(params.q, params.seqlen_q, params.q_heads, batch, params.q_strides, Traits::kBlockM);
  const CUtensorMap k = map(params.k, k_rows, params.kv_heads, k_count, params.k_strides, box);
  const CUtensorMap v = map(params.v, k_rows, params.kv_heads, k_count, params.v_strides, box);

  // Tiles are aligned to positions; packed, every sequence has up to two more than its length says.
  const int offset = packed ? 0 : params.q_start & (Traits::kBlockM - 1);
  params.q_tiles = packed ? params.seqlen_q / Traits::kBlockM + 2 * (params.batch + 1)
                          : (params.seqlen_q + offset + Traits::kBlockM - 1) / Traits::kBlockM;
  params.work_items = params.q_tiles * params.q_heads * batch;
  if (params.work_items == 0) return;

  int device = 0, multiprocessors = 0;
  LONGGEN_CUDA_CHECK(cudaGetDevice(&device));
  LONGGEN_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  kernel<<<std::min(params.work_items, multiprocessors), Traits::kThreads, Traits::kSharedBytes,
           params.stream>>>(params, q, k, v);
  LONGGEN_CHECK_LAUNCH("attn_fwd_kernel");
}

}  // namespace longgen::sm90
