// What one launch gets: plain data, filled by bindings.cpp from Python's keyword arguments.
//
// Pointers are device pointers; a comment beside each gives its shape. Strides count elements and
// are 64-bit, because a view of 128K tokens passes 2^31 elements. The last dimension of everything
// called "out" has stride 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace longgen {

enum class DType { kFloat16, kBFloat16, kFloat32 };

// Strides of the leading dimensions of a (batch, seqlen, heads, head_dim) tensor.
struct OutStrides {
  int64_t batch, seqlen, head;
};

// Strides of a (batch, heads, seqlen) tensor.
struct LseStrides {
  int64_t batch, head, seqlen;
};

// One partial attention state: the normalised output of attention to some keys, and the logarithm
// of its normaliser.
struct AttnState {
  const void* out;   // (batch, seqlen, heads, head_dim), DType
  const float* lse;  // (batch, heads, seqlen), natural logarithm
  OutStrides out_strides;
  LseStrides lse_strides;
};

struct MergeShape {
  int32_t batch, seqlen, heads, head_dim;
  DType dtype;
};

struct MergeParams {
  MergeShape shape;
  AttnState a, b;
  void* out;   // (batch, seqlen, heads, head_dim), contiguous, DType
  float* lse;  // (batch, heads, seqlen), contiguous
  cudaStream_t stream;
};

struct MergeBwdParams {
  MergeShape shape;
  AttnState a, b;
  const void* dout;   // (batch, seqlen, heads, head_dim), DType
  const float* dlse;  // (batch, heads, seqlen)
  OutStrides dout_strides;
  LseStrides dlse_strides;
  void* dout_a;   // (batch, seqlen, heads, head_dim), contiguous, DType; likewise dout_b
  float* dlse_a;  // (batch, heads, seqlen), contiguous; likewise dlse_b
  void* dout_b;
  float* dlse_b;
  cudaStream_t stream;
};

// Each enqueues its kernel on `stream` of the current device, allocates nothing, waits for nothing,
// and throws std::runtime_error when the launch fails. Empty shapes launch nothing.
void merge_attn_states(const MergeParams& params);
void merge_attn_states_bwd(const MergeBwdParams& params);

}  // namespace longgen
