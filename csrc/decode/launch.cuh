// Host side of the decode kernel: rows a block, stages, grid, launch.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda_check.h"
#include "decode/kernel.cuh"

namespace longgen::decode {

template <typename Traits>
void launch(DecodeParams params) {
  const auto kernel = decode_kernel<Traits>;
  int device = 0, block_bytes = 0, multiprocessor_bytes = 0;
  LONGGEN_CUDA_CHECK(cudaGetDevice(&device));
  LONGGEN_CUDA_CHECK(
      cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LONGGEN_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessor_bytes,
                                            cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  // As many stages as leave room for a second block, or else as fit.
  constexpr int kReserved = 1024;  // of each block, for the system
  const int room = Traits::kHeadDim > 128
                       ? block_bytes
                       : std::min(block_bytes, multiprocessor_bytes / 2 - kReserved);
  params.stages =
      Traits::shared_bytes(Traits::kMaxStages) <= room ? Traits::kMaxStages : Traits::kMinStages;
  const int bytes = Traits::shared_bytes(params.stages);
  // At each launch: the attribute belongs to a device, and which one is current may change.
  LONGGEN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 grid(params.splits, params.cache.kv_heads * params.row_tiles, params.cache.batch);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = params.stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(params.splits), 1, 1};
  if (params.in_cluster) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  LONGGEN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename T, int kHeadDim>
void launch_decode(DecodeParams params) {
  params.group = params.q_heads / params.cache.kv_heads;
  params.group_reciprocal = (65536 + params.group - 1) / params.group;
  params.scale_log2 = params.softmax_scale * 1.4426950408889634f;
  const int rows = params.n * params.group;
  const int per_tile = decode_rows_per_tile(rows, kHeadDim);
  params.row_tiles = (rows + per_tile - 1) / per_tile;
  if (params.in_cluster && (params.splits < 2 || params.splits > kMaxCluster))
    throw std::invalid_argument("a cluster has 2 to 8 splits");
  if (params.splits < 1 || params.splits > kMaxSplits)
    throw std::invalid_argument("splits must be from 1 to 128");
  if constexpr (kHeadDim <= 128) {
    if (per_tile == 32) return launch<DecodeTraits<T, kHeadDim, 2>>(params);
  }
  launch<DecodeTraits<T, kHeadDim, 1>>(params);
}

}  // namespace longgen::decode
