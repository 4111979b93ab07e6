// Host side of Hopper's decode kernel: tensor maps, clusters, launch.
#pragma once

#include <array>

#include "cuda_check.h"
#include "decode/grid.h"
#include "sm90/decode/kernel.cuh"
#include "sm90/decode/persistent.cuh"
#include "sm90/tensor_map.h"

namespace longgen::sm90 {

// Promotion to 256 bytes, which other kernels' maps have, would cost 7 to 10% of the time.
inline CUtensorMap cache_map(const CacheParams& cache, DType dtype, const void* data) {
  const bool paged = cache.block_table != nullptr;
  const int rows = paged ? 1 << cache.log2_page : cache.slots;
  const int blocks = paged ? cache.pool_pages : cache.batch;
  const CacheStrides& strides = cache.strides;
  return tensor_map(data, dtype, {cache.head_dim, rows, cache.kv_heads, blocks},
                    {strides.slot, strides.head, strides.block}, kChunk,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

template <typename Traits>
constexpr auto kernel_of() {
  if constexpr (Traits::kPersistent) {
    return persistent_decode_kernel<Traits>;
  } else {
    return decode_kernel<Traits>;
  }
}

template <typename Traits>
dim3 grid_of(const DecodeParams& params) {
  if (Traits::kPersistent) return dim3(params.persistent_blocks);
  // Of either half as many as run at once may leave with nothing.
  if (Traits::kByHalves) return dim3(params.items + Traits::kBlocks * params.seats / 2);
  if (params.seats > 0) return dim3(Traits::kBlocks * params.seats);
  return decode::grid_of(params);
}

template <typename Traits>
void launch(const DecodeParams& params) {
  const auto kernel = kernel_of<Traits>();
  // At each launch: the attribute belongs to a device, and which one is current may change.
  // Before the tensor maps: see tensor_map.
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          Traits::kSharedBytes));
  const DType dtype = Traits::kBytes == 1 ? DType::kFloat8 : params.cache.dtype;
  const CacheMaps maps{cache_map(params.cache, dtype, params.cache.k),
                       cache_map(params.cache, dtype, params.cache.v)};
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = params.starts_early;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = params.splits;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of<Traits>(params);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = params.stream;
  config.attrs = attributes.data();
  config.numAttrs = params.clustered ? 2 : 1;
  LONGGEN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params, maps));
}

template <typename T, typename Cached, int kHeadDim, int kOctets>
void launch_of_size(const DecodeParams& params) {
  if constexpr (kHeadDim <= 128 && sizeof(Cached) == 2) {
    if (params.small_blocks && params.seats == 0 && params.splits == 1)
      return launch<DecodeTraits<T, Cached, kHeadDim, kOctets, Blocks::kSmall>>(params);
    if (params.small_blocks && params.seats > 0 && params.items > 2 * params.seats)
      return launch<DecodeTraits<T, Cached, kHeadDim, kOctets, Blocks::kSmallByHalves>>(params);
    if (params.small_blocks)
      return launch<DecodeTraits<T, Cached, kHeadDim, kOctets, Blocks::kSmallInRow>>(params);
  }
  if (params.persistent_blocks > 0)
    return launch<DecodeTraits<T, Cached, kHeadDim, kOctets, Blocks::kPersistent>>(params);
  launch<DecodeTraits<T, Cached, kHeadDim, kOctets, Blocks::kBig>>(params);
}

template <typename T, typename Cached, int kHeadDim>
void launch_decode(const DecodeParams& params) {
  if constexpr (kHeadDim <= 128) {
    if (decode_rows_per_tile(params.n * params.group, kHeadDim) == 16)
      return launch_of_size<T, Cached, kHeadDim, 2>(params);
  }
  launch_of_size<T, Cached, kHeadDim, 1>(params);
}

}  // namespace longgen::sm90
