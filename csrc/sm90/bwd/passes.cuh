// The small kernels before and behind the backward kernel: statistics of rows, dQ as a tensor, sums
// of chunks.
#pragma once

#include "sm90/bwd/gradients.cuh"
#include "sm90/bwd/rows.cuh"
#include "sm90/bwd/statistics.cuh"
#include "sm90/bwd/traits.cuh"
#include "vector.cuh"

namespace longgen::sm90 {

// A query tile in the grid (tiles, query heads, batch) of the passes over queries.
template <int kRows>
struct QueryTile {
  Sequence sequence;
  int index;   // among all heads' query tiles
  int p_tile;  // position of its first row; may lie before the sequence

  __device__ explicit QueryTile(const AttentionBwdParams& params)
      : index((blockIdx.z * params.q_heads + blockIdx.y) * params.plan.q_tiles + blockIdx.x) {
    int tile = blockIdx.x;
    sequence = params.cu_seqlens_q == nullptr ? dense_sequence(params, blockIdx.z)
                                              : packed_sequence<true>(params, kRows, 2, tile);
    p_tile = (sequence.q_start & -kRows) + tile * kRows;
  }

  // Row `row` of the tile as a row of the tensor, or -1.
  __device__ int tensor_row(int row) const {
    const int q_row = p_tile - sequence.q_start + row;
    return q_row >= 0 && q_row < sequence.q_len ? sequence.q_row0 + q_row : -1;
  }
};

// delta = rowsum(dO * O) - dLSE, and the LSE in base 2: +inf, so that its weights are 0, for a row
// that sees nothing or does not exist. Clears dQ's sums and the count of items.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256)
    bwd_rows_kernel(const __grid_constant__ AttentionBwdParams params) {
  constexpr int kRows = query_rows(kHeadDim);
  constexpr int kChunks = kHeadDim / 8;  // threads a row
  const QueryTile<kRows> tile(params);
  const int head = blockIdx.y;
  const int chunk = threadIdx.x % kChunks;
  constexpr int kFloats = statistics_floats(kRows);
  float* const stats = params.stats + static_cast<int64_t>(tile.index) * 2 * kFloats;
#pragma unroll
  for (int first = 0; first < kRows; first += 256 / kChunks) {
    const int row = first + threadIdx.x / kChunks;
    const int q_row = tile.tensor_row(row);
    float delta = 0.f;
    if (q_row >= 0) {
      const auto load = [&](const void* data, const OutStrides& strides) {
        return Vector<T, 8>::load(static_cast<const T*>(data) +
                                  tile.sequence.batch * strides.batch + q_row * strides.seqlen +
                                  head * strides.head + chunk * 8);
      };
      const auto out = load(params.out, params.out_strides);
      const auto dout = load(params.dout, params.dout_strides);
#pragma unroll
      for (int i = 0; i < 8; ++i) delta += to_float(out.elems[i]) * to_float(dout.elems[i]);
    }
#pragma unroll
    for (int lanes = kChunks / 2; lanes > 0; lanes /= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, lanes);
    if (chunk != 0) continue;
    float lse = -INFINITY;
    if (q_row >= 0) {
      lse = params.lse[(static_cast<int64_t>(tile.sequence.batch) * params.q_heads + head) *
                           params.seqlen_q +
                       q_row];
      if (params.dlse != nullptr)
        delta -= params.dlse[tile.sequence.batch * params.dlse_strides.batch +
                             head * params.dlse_strides.head + q_row * params.dlse_strides.seqlen];
    }
    const bool blind = lse == -INFINITY;  // the gradient of such an LSE is often NaN
    const int slot = statistics_slot<kRows>(row);
    stats[slot] = blind ? INFINITY : lse * 1.4426950408889634f;
    stats[kFloats + slot] = blind ? 0.f : delta;
  }
  // The copy engine reads the gaps, too.
  if (threadIdx.x < 32)
    stats[threadIdx.x / 16 * kFloats + statistics_gap<kRows>(threadIdx.x % 16)] = 0.f;
  if (threadIdx.x == 0 && tile.index == 0) *params.next_item = 0;
  if (params.dq_sum == nullptr) return;
  float4* const dq_sum = reinterpret_cast<float4*>(params.dq_sum) +
                         static_cast<int64_t>(tile.index) * kRows * kHeadDim / 4;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kHeadDim / 4; i += 256)
    dq_sum[i] = float4{0.f, 0.f, 0.f, 0.f};
}

// dQ as a tensor.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256)
    bwd_dq_kernel(const __grid_constant__ AttentionBwdParams params) {
  constexpr int kRows = query_rows(kHeadDim);
  const QueryTile<kRows> tile(params);
  const DqPart<kHeadDim> part(threadIdx.x / 128);
  float dq[DqPart<kHeadDim>::kFloats / 128] = {};
  constexpr int kFloats = kRows * kHeadDim;
  add_accumulators(
      params.dq_sum + static_cast<int64_t>(tile.index) * kFloats + threadIdx.x / 32 * (kFloats / 8),
      dq);
  T* rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q_row = tile.tensor_row(part.row + accumulator_row() + 8 * half);
    const int64_t row =
        (static_cast<int64_t>(tile.sequence.batch) * params.seqlen_q + q_row) * params.q_heads +
        blockIdx.y;
    rows[half] = q_row < 0 ? nullptr : static_cast<T*>(params.dq) + row * kHeadDim + part.column;
  }
  store_rows(rows[0], rows[1], dq, params.softmax_scale);
}

// dK and dV of the global key tiles from their chunks' sums, always in the same order; grid (tiles,
// KV heads, batch).
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(256)
    bwd_chunks_kernel(const __grid_constant__ AttentionBwdParams params) {
  const BwdPlan& plan = params.plan;
  Item item;
  if (!find_key_tile<query_rows(kHeadDim)>(params, true, blockIdx.x, blockIdx.y, blockIdx.z, item))
    return;
  const int chunks = max((item.steps + plan.chunk_steps - 1) / plan.chunk_steps, 1);
  const int warpgroup = threadIdx.x / 128;
  const int64_t first = (static_cast<int64_t>(blockIdx.z) * params.kv_heads + blockIdx.y) *
                            plan.chunks * plan.global_slots +
                        blockIdx.x;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {  // dK, dV
    float sum[kHeadDim / 2] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk)
      add_accumulators(params.partials +
                           ((first + static_cast<int64_t>(chunk) * plan.global_slots) * 2 + which) *
                               kKeyTile * kHeadDim +
                           threadIdx.x / 32 * 16 * kHeadDim,
                       sum);
    T* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warpgroup * 64 + accumulator_row() + 8 * half;
      rows[half] = nullptr;
      if (item.keys.owns(row)) {
        const int position = item.keys.position(params.pattern, item.keys.column0 + row);
        rows[half] = static_cast<T*>(which == 0 ? params.dk : params.dv) +
                     gradient_offset<kHeadDim>(params, item, item.k_row(position));
      }
    }
    store_rows(rows[0], rows[1], sum, which == 0 ? params.softmax_scale : 1.f);
  }
}

}  // namespace longgen::sm90
