// Host side of the decode kernel: rows a block, grid, launch.
#pragma once

#include "cuda_check.h"
#include "decode/grid.h"
#include "decode/kernel.cuh"
#include "decode/traits.cuh"

namespace longgen::decode {

template <typename Traits>
void launch(const DecodeParams& params) {
  const auto kernel = decode_kernel<Traits>;
  // At each launch: the attribute belongs to a device, and which one is current may change.
  LONGGEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          Traits::kSharedBytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of(params);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = params.stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (params.starts_early) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  LONGGEN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

template <typename T, int kHeadDim>
void launch_decode(const DecodeParams& params) {
  if constexpr (kHeadDim <= 128) {
    if (decode_rows_per_tile(params.n * params.group, kHeadDim) == 16)
      return launch<DecodeTraits<T, kHeadDim, 2>>(params);
  }
  launch<DecodeTraits<T, kHeadDim, 1>>(params);
}

}  // namespace longgen::decode
