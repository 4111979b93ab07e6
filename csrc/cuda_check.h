// Turns a CUDA error into an exception that names the call and the place.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace longgen {

inline void cuda_check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + file + ":" + std::to_string(line));
}

}  // namespace longgen

#define LONGGEN_CUDA_CHECK(call) ::longgen::cuda_check((call), #call, __FILE__, __LINE__)

// After a launch. Only the launch itself is checked: an error inside the kernel shows at a later
// call.
#define LONGGEN_CHECK_LAUNCH(kernel) \
  ::longgen::cuda_check(cudaGetLastError(), "launch of " kernel, __FILE__, __LINE__)
