// Appends a chunk of tokens to a cache: each KV head's keys and values to the slots of their
// positions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "cuda_check.h"
#include "decode/append.cuh"

namespace longgen {
namespace {

constexpr int kWarps = 4;
constexpr int kTokens = 16;  // a block

// Copies 16-bit elements, whatever their type. Grid: tokens, KV heads, sequences.
template <int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps)
    cache_append_kernel(const __grid_constant__ CacheAppendParams params) {
  const int kv_head = blockIdx.y, sequence = blockIdx.z;
  const int seqlen = __ldcg(params.cache.seqlens + sequence);
  const int count = decode::new_tokens(params.new_tokens, sequence);
  const int end = seqlen + count;
  const int first = blockIdx.x * kTokens;
  const CacheSlots slots(params.cache, kv_head, end, end, end);
  for (int i = first + threadIdx.x / 32; i < min(first + kTokens, count); i += kWarps) {
    const int slot = slots.slot(seqlen + i, end);
    if (slot >= 0)
      decode::write_token<uint16_t, kHeadDim>(params.cache, params.new_tokens, sequence, kv_head, i,
                                              slot);
  }
  if (params.new_tokens.advance &&
      decode::is_last(params.tickets + sequence, gridDim.x * gridDim.y) && threadIdx.x == 0)
    params.cache.seqlens[sequence] = end;
}

template <int kHeadDim>
void launch(const CacheAppendParams& params) {
  const dim3 grid((params.new_tokens.n + kTokens - 1) / kTokens, params.cache.kv_heads,
                  params.cache.batch);
  cache_append_kernel<kHeadDim><<<grid, 32 * kWarps, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("cache_append_kernel");
}

}  // namespace

void cache_append(const CacheAppendParams& params) {
  if (params.cache.batch == 0 || params.new_tokens.n == 0) return;
  switch (params.cache.head_dim) {
    case 64:
      return launch<64>(params);
    case 96:
      return launch<96>(params);
    case 128:
      return launch<128>(params);
    case 256:
      return launch<256>(params);
    default:
      throw std::invalid_argument("the kernel takes head_dim 64, 96, 128 and 256");
  }
}

}  // namespace longgen
