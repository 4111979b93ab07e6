// Merges two partial attention states of the same queries by their log-sum-exp, and the gradient of
// that.
//
// Both kernels read and write each byte once and compute next to nothing, so all that matters is
// memory traffic: 16 bytes a thread and access, enough of them in flight, and whole sectors of lse
// (row_tiles.h).

#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>

#include "cuda_check.h"
#include "merge/row_tiles.h"
#include "params.h"
#include "vector.cuh"

namespace longgen {
namespace {

struct Merged {
  float weight_a, weight_b, lse;
};

// weight_a = exp(lse_a - lse) with lse = log(exp(lse_a) + exp(lse_b)), through the difference of
// the two, which keeps its precision where lse itself is large. +inf is a number like any other
// here.
__device__ Merged merge_lse(float lse_a, float lse_b) {
  const float difference = lse_a == lse_b ? 0.f : lse_a - lse_b;  // -inf - -inf would be NaN
  const float ratio = expf(-fabsf(difference));
  const float larger = 1.f / (1.f + ratio);
  const float smaller = ratio * larger;
  Merged merged;
  merged.weight_a = lse_a == -INFINITY ? 0.f : difference >= 0.f ? larger : smaller;
  merged.weight_b = lse_b == -INFINITY ? 0.f : difference >= 0.f ? smaller : larger;
  merged.lse = fmaxf(lse_a, lse_b) + log1pf(ratio);
  return merged;
}

// A state of weight zero saw nothing, and its values may be anything, NaN included: it is left out,
// not multiplied by 0.
__device__ float weighted(float weight, float x) { return weight == 0.f ? 0.f : weight * x; }

template <typename T>
__device__ const T* row_of(const void* tensor, const OutStrides& strides, const Row& row) {
  return static_cast<const T*>(tensor) + row.offset(strides);
}

__device__ OutStrides contiguous_out(const MergeShape& shape) {
  const int64_t token = int64_t(shape.heads) * shape.head_dim;
  return {token * shape.seqlen, token, shape.head_dim};
}

__device__ LseStrides contiguous_lse(const MergeShape& shape) {
  return {int64_t(shape.heads) * shape.seqlen, shape.seqlen, 1};
}

template <typename T, int kElems>
__global__ void __launch_bounds__(RowTiles::kThreads)
    merge_kernel(const __grid_constant__ MergeParams p, const __grid_constant__ RowTiles tiles) {
  using Elems = Vector<T, kElems>;
  const Row row(tiles, p.shape);
  if (!row.exists) return;
  const T* const out_a = row_of<T>(p.a.out, p.a.out_strides, row);
  const T* const out_b = row_of<T>(p.b.out, p.b.out_strides, row);
  T* const out = static_cast<T*>(p.out) + row.offset(contiguous_out(p.shape));

  // The first elements are asked for before lse is waited for: otherwise two latencies follow each
  // other.
  int i = threadIdx.x * kElems;
  Elems a, b;
  if (i < p.shape.head_dim) {
    a = Elems::load(out_a + i);
    b = Elems::load(out_b + i);
  }
  const Merged merged =
      merge_lse(p.a.lse[row.offset(p.a.lse_strides)], p.b.lse[row.offset(p.b.lse_strides)]);
  if (threadIdx.x == 0) p.lse[row.offset(contiguous_lse(p.shape))] = merged.lse;

  while (i < p.shape.head_dim) {
    Elems sum;
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      sum.elems[e] = from_float<T>(weighted(merged.weight_a, to_float(a.elems[e])) +
                                   weighted(merged.weight_b, to_float(b.elems[e])));
    }
    sum.store(out + i);
    i += tiles.lanes * kElems;
    if (i < p.shape.head_dim) {
      a = Elems::load(out_a + i);
      b = Elems::load(out_b + i);
    }
  }
}

// With w_a + w_b = 1:  dout_a = w_a * dout,  dlse_a = w_a * (dlse + dout . (out_a - out)),  out_a -
// out = w_b * (out_a - out_b).
template <typename T, int kElems>
__global__ void __launch_bounds__(RowTiles::kThreads)
    merge_bwd_kernel(const __grid_constant__ MergeBwdParams p,
                     const __grid_constant__ RowTiles tiles) {
  using Elems = Vector<T, kElems>;
  const Row row(tiles, p.shape);
  if (!row.exists) return;  // all lanes of a row, or none
  const T* const out_a = row_of<T>(p.a.out, p.a.out_strides, row);
  const T* const out_b = row_of<T>(p.b.out, p.b.out_strides, row);
  const T* const dout = row_of<T>(p.dout, p.dout_strides, row);
  const int64_t grad_offset = row.offset(contiguous_out(p.shape));
  T* const dout_a = static_cast<T*>(p.dout_a) + grad_offset;
  T* const dout_b = static_cast<T*>(p.dout_b) + grad_offset;
  const Merged merged =
      merge_lse(p.a.lse[row.offset(p.a.lse_strides)], p.b.lse[row.offset(p.b.lse_strides)]);

  float dot = 0.f;  // dout . (out_a - out_b)
  for (int i = threadIdx.x * kElems; i < p.shape.head_dim; i += tiles.lanes * kElems) {
    const Elems a = Elems::load(out_a + i);
    const Elems b = Elems::load(out_b + i);
    const Elems d = Elems::load(dout + i);
    Elems d_a, d_b;
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      const float grad = to_float(d.elems[e]);
      const float difference = (merged.weight_a == 0.f ? 0.f : to_float(a.elems[e])) -
                               (merged.weight_b == 0.f ? 0.f : to_float(b.elems[e]));
      dot += grad * difference;
      d_a.elems[e] = from_float<T>(weighted(merged.weight_a, grad));
      d_b.elems[e] = from_float<T>(weighted(merged.weight_b, grad));
    }
    d_a.store(dout_a + i);
    d_b.store(dout_b + i);
  }

  const int lane_in_warp = (threadIdx.y * tiles.lanes + threadIdx.x) % 32;
  const unsigned row_lanes = (0xffffffffu >> (32 - tiles.lanes))
                             << (lane_in_warp & ~(tiles.lanes - 1));
  for (int distance = tiles.lanes / 2; distance > 0; distance /= 2) {
    dot += __shfl_xor_sync(row_lanes, dot, distance);
  }
  if (threadIdx.x == 0) {
    const float dlse = p.dlse[row.offset(p.dlse_strides)];
    const int64_t offset = row.offset(contiguous_lse(p.shape));
    p.dlse_a[offset] = weighted(merged.weight_a, dlse + merged.weight_b * dot);
    p.dlse_b[offset] = weighted(merged.weight_b, dlse - merged.weight_a * dot);
  }
}

template <typename T, int kElems>
struct Access {
  using Elem = T;
  static constexpr int elems = kElems;
};

// Calls launch(Access) with 16 bytes an access where every row starts at a multiple of them,
// otherwise with one element.
template <typename Launch>
void with_access(const MergeShape& shape, bool aligned, Launch launch) {
  switch (shape.dtype) {
    case DType::kFloat16:
      return aligned ? launch(Access<__half, 8>{}) : launch(Access<__half, 1>{});
    case DType::kBFloat16:
      return aligned ? launch(Access<__nv_bfloat16, 8>{}) : launch(Access<__nv_bfloat16, 1>{});
    case DType::kFloat32:
      return aligned ? launch(Access<float, 4>{}) : launch(Access<float, 1>{});
    default:
      throw std::invalid_argument("the kernel takes float16, bfloat16 and float32");
  }
}

bool rows_aligned(const MergeShape& shape, const void* tensor, const OutStrides& strides) {
  const int64_t elem_bytes = shape.dtype == DType::kFloat32 ? 4 : 2;
  const auto aligned = [&](int64_t elems) { return elems * elem_bytes % 16 == 0; };
  // The stride of a dimension of one element is never taken, and can be anything.
  return reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && aligned(shape.head_dim) &&
         (shape.batch == 1 || aligned(strides.batch)) &&
         (shape.seqlen == 1 || aligned(strides.seqlen)) &&
         (shape.heads == 1 || aligned(strides.head));
}

bool is_empty(const MergeShape& shape) {
  return shape.batch == 0 || shape.seqlen == 0 || shape.heads == 0 || shape.head_dim == 0;
}

}  // namespace

void merge_attn_states(const MergeParams& params) {
  if (is_empty(params.shape)) return;
  const bool aligned = rows_aligned(params.shape, params.a.out, params.a.out_strides) &&
                       rows_aligned(params.shape, params.b.out, params.b.out_strides);
  with_access(params.shape, aligned, [&](auto access) {
    const RowTiles tiles(params.shape, access.elems);
    merge_kernel<typename decltype(access)::Elem, access.elems>
        <<<tiles.grid(), tiles.block(), 0, params.stream>>>(params, tiles);
  });
  LONGGEN_CHECK_LAUNCH("merge_attn_states");
}

void merge_attn_states_bwd(const MergeBwdParams& params) {
  if (is_empty(params.shape)) return;
  const bool aligned = rows_aligned(params.shape, params.a.out, params.a.out_strides) &&
                       rows_aligned(params.shape, params.b.out, params.b.out_strides) &&
                       rows_aligned(params.shape, params.dout, params.dout_strides);
  with_access(params.shape, aligned, [&](auto access) {
    const RowTiles tiles(params.shape, access.elems);
    merge_bwd_kernel<typename decltype(access)::Elem, access.elems>
        <<<tiles.grid(), tiles.block(), 0, params.stream>>>(params, tiles);
  });
  LONGGEN_CHECK_LAUNCH("merge_attn_states_bwd");
}

}  // namespace longgen
