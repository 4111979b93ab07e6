#include "sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda_check.h"

namespace longgen::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there at run time: nothing is linked, so that importing needs no driver.
Encode encode_function() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    LONGGEN_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                        cudaEnableDefault, &found));
#else
    LONGGEN_CUDA_CHECK(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error(
          "the NVIDIA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, std::array<int64_t, 4> sizes,
                       std::array<int64_t, 3> strides, int box_rows,
                       CUtensorMapL2promotion promotion) {
  const int element = dtype == DType::kFloat8 ? 1 : 2;  // bytes
  const auto type = dtype == DType::kFloat8    ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                    : dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const bool narrow = sizes[0] * element <= 64;
  std::array<cuuint64_t, 4> dims{};
  for (int i = 0; i < 4; ++i) dims[i] = static_cast<cuuint64_t>(sizes[i]);
  std::array<cuuint64_t, 3> bytes{};
  // The stride of a dimension of one element is never taken, and can be anything; the encoder takes
  // multiples of 16.
  for (int i = 0; i < 3; ++i)
    bytes[i] = sizes[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(strides[i]) * element;
  const std::array<cuuint32_t, 4> box{static_cast<cuuint32_t>((narrow ? 64 : 128) / element),
                                      static_cast<cuuint32_t>(box_rows), 1, 1};
  const std::array<cuuint32_t, 4> step{1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode_function()(&map, type, 4, const_cast<void*>(data), dims.data(), bytes.data(),
                        box.data(), step.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
                        narrow ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refused a tensor (CUresult " +
                             std::to_string(status) + ")");
  return map;
}

}  // namespace longgen::sm90
