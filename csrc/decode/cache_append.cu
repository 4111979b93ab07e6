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

// Grid: tokens, KV heads, sequences.
template <typename T, typename Cached, int kHeadDim>
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
      decode::write_token<T, Cached, kHeadDim>(params.cache, params.scales, params.new_tokens,
                                               sequence, kv_head, i, slot);
  }
  using Team = decode::BlockTeam<32 * kWarps>;
  if (params.new_tokens.advance &&
      decode::is_last(Team(), params.tickets + sequence, gridDim.x * gridDim.y) && threadIdx.x == 0)
    params.cache.seqlens[sequence] = end;
}

template <typename T, typename Cached, int kHeadDim>
void launch(const CacheAppendParams& params) {
  const dim3 grid((params.new_tokens.n + kTokens - 1) / kTokens, params.cache.kv_heads,
                  params.cache.batch);
  cache_append_kernel<T, Cached, kHeadDim><<<grid, 32 * kWarps, 0, params.stream>>>(params);
  LONGGEN_CHECK_LAUNCH("cache_append_kernel");
}

template <typename T>
void quantise(const CacheAppendParams& params) {
  switch (params.cache.head_dim) {
    case 64:
      return launch<T, __nv_fp8_e4m3, 64>(params);
    case 128:
      return launch<T, __nv_fp8_e4m3, 128>(params);
    default:
      throw std::invalid_argument("the kernel takes head_dim 64 and 128 for fp8 caches");
  }
}

// 16-bit elements, whatever their type.
void copy(const CacheAppendParams& params) {
  switch (params.cache.head_dim) {
    case 64:
      return launch<uint16_t, uint16_t, 64>(params);
    case 96:
      return launch<uint16_t, uint16_t, 96>(params);
    case 128:
      return launch<uint16_t, uint16_t, 128>(params);
    case 256:
      return launch<uint16_t, uint16_t, 256>(params);
    default:
      throw std::invalid_argument("the kernel takes head_dim 64, 96, 128 and 256");
  }
}

}  // namespace

void cache_append(const CacheAppendParams& params) {
  if (params.cache.batch == 0 || params.new_tokens.n == 0) return;
  if (params.scales.k == nullptr) return copy(params);
  if (params.cache.dtype == DType::kFloat16) return quantise<__half>(params);
  quantise<__nv_bfloat16>(params);
}

}  // namespace longgen
