// The only file that knows Python: arguments become params structs, a CUDA error becomes an
// exception. Those of short calls come by position: 40 keywords would take longer than an
// allocation.
//
// Tensors come as addresses (int), strides in elements and sizes, the stream as its handle (int).
// What the addresses point to is the caller's promise; longgen_kernels/kernels/cuda keeps it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_check.h"
#include "params.h"
#include "pattern_code.h"

namespace py = pybind11;
using namespace py::literals;

namespace longgen {
namespace {

using Address = std::uintptr_t;
using Strides = std::array<int64_t, 3>;  // of the first three dimensions, in their order

DType parse_dtype(const std::string& name) {
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float32") return DType::kFloat32;
  throw std::invalid_argument("dtype is '" + name + "'; valid are float16, bfloat16 and float32");
}

OutStrides out_strides(const Strides& s) { return {s[0], s[1], s[2]}; }
LseStrides lse_strides(const Strides& s) { return {s[0], s[1], s[2]}; }

// `tensor.stride()` of (batch, seqlen, heads, head_dim), or packed, of (total, heads, head_dim): a
// batch of one. Read by Python's own functions, as pybind's conversion to an array takes several
// times as long.
OutStrides tensor_strides(const py::tuple& strides) {
  const Py_ssize_t ndim = PyTuple_GET_SIZE(strides.ptr());
  if (ndim != 3 && ndim != 4) throw std::invalid_argument("strides must be of 3 or 4 dimensions");
  const auto from_end = [&](Py_ssize_t i) -> int64_t {
    return i > ndim ? 0 : PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), ndim - i));
  };
  const OutStrides result{from_end(4), from_end(3), from_end(2)};
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

AttnState attn_state(Address out, const Strides& out_stride, Address lse,
                     const Strides& lse_stride) {
  return {reinterpret_cast<const void*>(out), reinterpret_cast<const float*>(lse),
          out_strides(out_stride), lse_strides(lse_stride)};
}

const int32_t* as_ints(Address address) { return reinterpret_cast<const int32_t*>(address); }
float* as_floats(Address address) { return reinterpret_cast<float*>(address); }

// A cache's arguments, as Python passes them.
CacheParams cache_params(const std::array<int32_t, 9>& pattern, int ring, int sink_slots, int batch,
                         int kv_heads, int head_dim, int slots, int pages, int log2_page,
                         int pool_pages, const std::string& dtype, Address k, Address v,
                         const Strides& strides, Address seqlens, Address block_table) {
  CacheParams cache{};
  cache.pattern = parse_pattern(pattern, nullptr);
  cache.ring = ring;
  cache.sink_slots = sink_slots;
  cache.batch = batch;
  cache.kv_heads = kv_heads;
  cache.head_dim = head_dim;
  cache.slots = slots;
  cache.pages = pages;
  cache.log2_page = log2_page;
  cache.pool_pages = pool_pages;
  cache.dtype = parse_dtype(dtype);
  cache.k = reinterpret_cast<void*>(k);
  cache.v = reinterpret_cast<void*>(v);
  cache.strides = {strides[0], strides[1], strides[2]};
  cache.seqlens = reinterpret_cast<int32_t*>(seqlens);
  cache.block_table = as_ints(block_table);
  return cache;
}

CacheScales cache_scales(Address k, Address v) {
  return {reinterpret_cast<const float*>(k), reinterpret_cast<const float*>(v)};
}

NewTokensParams new_tokens_params(Address k, Address v, const Strides& strides, int n,
                                  Address counts, bool advance) {
  return {reinterpret_cast<const void*>(k),
          reinterpret_cast<const void*>(v),
          out_strides(strides),
          n,
          as_ints(counts),
          advance};
}

cudaStream_t as_stream(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

py::dict build_info() {
  // Answers without a driver too: cudaDriverGetVersion gives 0 then.
  int driver = 0;
  LONGGEN_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return py::dict("cuda_archs"_a = LONGGEN_CUDA_ARCHS, "cuda_runtime"_a = CUDART_VERSION,
                  "cuda_driver"_a = driver);
}

}  // namespace
}  // namespace longgen

PYBIND11_MODULE(_C, m) {
  using namespace longgen;
  m.doc() = "The CUDA kernels of longgen_kernels. Use them through longgen_kernels.kernels.cuda.";

  m.def("build_info", &build_info,
        "Compute capabilities built for, CUDA version built with, and newest CUDA version that the "
        "installed "
        "driver runs (0: no driver).");

#ifdef LONGGEN_SM90
  m.def("attn_fwd_sm90",
        [](const std::array<int32_t, 9>& pattern, Address mask_rows, int batch, int seqlen_q,
           int seqlen_k, int q_heads, int kv_heads, int head_dim, const std::string& dtype,
           float softmax_scale, Address q, const py::tuple& q_strides, Address k,
           const py::tuple& k_strides, Address v, const py::tuple& v_strides, Address out,
           Address lse, int q_start, int k_start, Address cu_seqlens_q, Address cu_seqlens_k,
           Address q_starts, Address k_starts, Address block_table, int pages, int page_size,
           int table_pages, Address stream) {
          AttentionFwdParams params{};
          params.pattern = parse_pattern(pattern, as_ints(mask_rows));
          params.batch = batch;
          params.seqlen_q = seqlen_q;
          params.seqlen_k = seqlen_k;
          params.q_heads = q_heads;
          params.kv_heads = kv_heads;
          params.head_dim = head_dim;
          params.dtype = parse_dtype(dtype);
          params.softmax_scale = softmax_scale;
          params.q = reinterpret_cast<const void*>(q);
          params.k = reinterpret_cast<const void*>(k);
          params.v = reinterpret_cast<const void*>(v);
          params.q_strides = tensor_strides(q_strides);
          params.k_strides = tensor_strides(k_strides);
          params.v_strides = tensor_strides(v_strides);
          params.out = reinterpret_cast<void*>(out);
          params.lse = reinterpret_cast<float*>(lse);
          params.q_start = q_start;
          params.k_start = k_start;
          params.cu_seqlens_q = as_ints(cu_seqlens_q);
          params.cu_seqlens_k = as_ints(cu_seqlens_k);
          params.q_starts = as_ints(q_starts);
          params.k_starts = as_ints(k_starts);
          params.block_table = as_ints(block_table);
          params.pages = pages;
          params.page_size = page_size;
          params.table_pages = table_pages;
          params.stream = as_stream(stream);
          py::gil_scoped_release release;
          attn_fwd_sm90(params);
        });

  m.def(
      "attn_bwd_sm90_workspace",
      [](const std::array<int32_t, 9>& pattern, int batch, int seqlen_q, int seqlen_k, int q_heads,
         int kv_heads, int head_dim, int q_start, int k_start, bool packed, bool deterministic,
         int multiprocessors) {
        static const int32_t kAnyOffsets[1] = {};
        AttentionBwdParams params{};
        params.pattern = parse_pattern(pattern, nullptr);
        params.batch = batch;
        params.seqlen_q = seqlen_q;
        params.seqlen_k = seqlen_k;
        params.q_heads = q_heads;
        params.kv_heads = kv_heads;
        params.head_dim = head_dim;
        params.q_start = q_start;
        params.k_start = k_start;
        params.cu_seqlens_q = params.cu_seqlens_k = packed ? kAnyOffsets : nullptr;
        params.deterministic = deterministic;
        params.multiprocessors = multiprocessors;
        const BwdWorkspace sizes = attn_bwd_sm90_workspace(params);
        return py::dict("stats"_a = sizes.stats, "dq_sum"_a = sizes.dq_sum,
                        "partials"_a = sizes.partials);
      },
      "Numbers of floats in attn_bwd_sm90's workspaces.", py::kw_only(), "pattern"_a, "batch"_a,
      "seqlen_q"_a, "seqlen_k"_a, "q_heads"_a, "kv_heads"_a, "head_dim"_a, "q_start"_a, "k_start"_a,
      "packed"_a, "deterministic"_a, "multiprocessors"_a);

  m.def(
      "attn_bwd_sm90",
      [](const std::array<int32_t, 9>& pattern, Address mask_rows, Address mask_cols, int batch,
         int seqlen_q, int seqlen_k, int q_heads, int kv_heads, int head_dim,
         const std::string& dtype, float softmax_scale, Address q, const py::tuple& q_strides,
         Address k, const py::tuple& k_strides, Address v, const py::tuple& v_strides, Address out_,
         const py::tuple& out_strides, Address dout, const py::tuple& dout_strides, Address lse,
         Address dlse, const Strides& dlse_strides, Address dq, Address dk, Address dv, int q_start,
         int k_start, Address cu_seqlens_q, Address cu_seqlens_k, Address q_starts,
         Address k_starts, bool deterministic, int multiprocessors, Address stats, Address dq_sum,
         Address partials, Address next_item, Address stream) {
        AttentionBwdParams params{};
        params.pattern = parse_pattern(pattern, as_ints(mask_rows), as_ints(mask_cols));
        params.batch = batch;
        params.seqlen_q = seqlen_q;
        params.seqlen_k = seqlen_k;
        params.q_heads = q_heads;
        params.kv_heads = kv_heads;
        params.head_dim = head_dim;
        params.dtype = parse_dtype(dtype);
        params.softmax_scale = softmax_scale;
        params.q = reinterpret_cast<const void*>(q);
        params.k = reinterpret_cast<const void*>(k);
        params.v = reinterpret_cast<const void*>(v);
        params.out = reinterpret_cast<const void*>(out_);
        params.dout = reinterpret_cast<const void*>(dout);
        params.q_strides = tensor_strides(q_strides);
        params.k_strides = tensor_strides(k_strides);
        params.v_strides = tensor_strides(v_strides);
        params.out_strides = tensor_strides(out_strides);
        params.dout_strides = tensor_strides(dout_strides);
        params.lse = as_floats(lse);
        params.dlse = as_floats(dlse);
        params.dlse_strides = lse_strides(dlse_strides);
        params.dq = reinterpret_cast<void*>(dq);
        params.dk = reinterpret_cast<void*>(dk);
        params.dv = reinterpret_cast<void*>(dv);
        params.q_start = q_start;
        params.k_start = k_start;
        params.cu_seqlens_q = as_ints(cu_seqlens_q);
        params.cu_seqlens_k = as_ints(cu_seqlens_k);
        params.q_starts = as_ints(q_starts);
        params.k_starts = as_ints(k_starts);
        params.deterministic = deterministic;
        params.multiprocessors = multiprocessors;
        params.stats = as_floats(stats);
        params.dq_sum = as_floats(dq_sum);
        params.partials = as_floats(partials);
        params.next_item = reinterpret_cast<int32_t*>(next_item);
        params.stream = as_stream(stream);
        py::gil_scoped_release release;
        attn_bwd_sm90(params);
      },
      py::kw_only(), "pattern"_a, "mask_rows"_a, "mask_cols"_a, "batch"_a, "seqlen_q"_a,
      "seqlen_k"_a, "q_heads"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a, "softmax_scale"_a, "q"_a,
      "q_strides"_a, "k"_a, "k_strides"_a, "v"_a, "v_strides"_a, "out"_a, "out_strides"_a, "dout"_a,
      "dout_strides"_a, "lse"_a, "dlse"_a, "dlse_strides"_a, "dq"_a, "dk"_a, "dv"_a, "q_start"_a,
      "k_start"_a, "cu_seqlens_q"_a, "cu_seqlens_k"_a, "q_starts"_a, "k_starts"_a,
      "deterministic"_a, "multiprocessors"_a, "stats"_a, "dq_sum"_a, "partials"_a, "next_item"_a,
      "stream"_a);

  m.def("measure_multiprocessors", [](int multiprocessors, int lines, int stride, Address zeros,
                                      Address memory, int64_t nbytes, Address latencies,
                                      Address rates, Address are_there, Address stream) {
    py::gil_scoped_release release;
    measure_multiprocessors({multiprocessors, lines, stride, reinterpret_cast<uint32_t*>(zeros),
                             reinterpret_cast<const char*>(memory), nbytes,
                             reinterpret_cast<int32_t*>(latencies),
                             reinterpret_cast<int32_t*>(rates),
                             reinterpret_cast<int32_t*>(are_there), as_stream(stream)});
  });
#endif

  m.def("decode_rows_per_tile", &decode_rows_per_tile, py::kw_only(), "rows"_a, "head_dim"_a);

  m.def("cache_append",
        [](const std::array<int32_t, 9>& pattern, int ring, int sink_slots, int batch, int kv_heads,
           int head_dim, int slots, int pages, int log2_page, int pool_pages,
           const std::string& dtype, Address k_cache, Address v_cache, const Strides& cache_strides,
           Address seqlens, Address block_table, Address k_scale, Address v_scale, Address k,
           Address v, const Strides& new_strides, int n_new, Address counts, bool advance,
           Address tickets, Address stream) {
          CacheAppendParams params{};
          params.cache = cache_params(pattern, ring, sink_slots, batch, kv_heads, head_dim, slots,
                                      pages, log2_page, pool_pages, dtype, k_cache, v_cache,
                                      cache_strides, seqlens, block_table);
          params.scales = cache_scales(k_scale, v_scale);
          params.new_tokens = new_tokens_params(k, v, new_strides, n_new, counts, advance);
          params.tickets = reinterpret_cast<uint32_t*>(tickets);
          params.stream = as_stream(stream);
          py::gil_scoped_release release;
          cache_append(params);
        });

  m.def("attn_decode",
        [](const std::array<int32_t, 9>& pattern, int ring, int sink_slots, int batch, int kv_heads,
           int head_dim, int slots, int pages, int log2_page, int pool_pages,
           const std::string& dtype, Address k_cache, Address v_cache, const Strides& cache_strides,
           Address seqlens, Address block_table, Address k_scale, Address v_scale, Address k,
           Address v, const Strides& new_strides, int n_new, Address counts, bool advance,
           Address tickets, Address seat_counts, int n, int q_heads, int q_offset,
           float softmax_scale, Address q, const Strides& q_strides, Address out, Address lse,
           int splits, int whole_tiles, bool starts_early, bool bulk, bool clustered,
           bool small_blocks, int persistent_blocks, int seats,
           const std::array<uint64_t, 4>& seat_bits, Address part_out, Address part_weights,
           Address stream) {
          DecodeParams params{};
          params.cache = cache_params(pattern, ring, sink_slots, batch, kv_heads, head_dim, slots,
                                      pages, log2_page, pool_pages, dtype, k_cache, v_cache,
                                      cache_strides, seqlens, block_table);
          params.scales = cache_scales(k_scale, v_scale);
          params.new_tokens = new_tokens_params(k, v, new_strides, n_new, counts, advance);
          params.tickets = reinterpret_cast<uint32_t*>(tickets);
          params.seat_counts = reinterpret_cast<uint32_t*>(seat_counts);
          params.n = n;
          params.q_heads = q_heads;
          params.q_offset = q_offset;
          params.softmax_scale = softmax_scale;
          params.q = reinterpret_cast<const void*>(q);
          params.q_strides = out_strides(q_strides);
          params.out = reinterpret_cast<void*>(out);
          params.lse = reinterpret_cast<float*>(lse);
          params.splits = splits;
          params.whole_tiles = whole_tiles;
          params.starts_early = starts_early;
          params.bulk = bulk;
          params.clustered = clustered;
          params.small_blocks = small_blocks;
          params.persistent_blocks = persistent_blocks;
          params.seats = seats;
          std::copy(seat_bits.begin(), seat_bits.end(), params.seat_bits);
          params.part_out = reinterpret_cast<float*>(part_out);
          params.part_weights = reinterpret_cast<float*>(part_weights);
          params.stream = as_stream(stream);
          py::gil_scoped_release release;
          attn_decode(params);
        });

  m.def(
      "merge_attn_states",
      [](int batch, int seqlen, int heads, int head_dim, const std::string& dtype, Address out_a,
         const Strides& out_a_strides, Address lse_a, const Strides& lse_a_strides, Address out_b,
         const Strides& out_b_strides, Address lse_b, const Strides& lse_b_strides, Address out,
         Address lse, Address stream) {
        MergeParams params{};
        params.shape = {batch, seqlen, heads, head_dim, parse_dtype(dtype)};
        params.a = attn_state(out_a, out_a_strides, lse_a, lse_a_strides);
        params.b = attn_state(out_b, out_b_strides, lse_b, lse_b_strides);
        params.out = reinterpret_cast<void*>(out);
        params.lse = reinterpret_cast<float*>(lse);
        params.stream = as_stream(stream);
        py::gil_scoped_release release;
        merge_attn_states(params);
      },
      py::kw_only(), "batch"_a, "seqlen"_a, "heads"_a, "head_dim"_a, "dtype"_a, "out_a"_a,
      "out_a_strides"_a, "lse_a"_a, "lse_a_strides"_a, "out_b"_a, "out_b_strides"_a, "lse_b"_a,
      "lse_b_strides"_a, "out"_a, "lse"_a, "stream"_a);

  m.def(
      "merge_attn_states_bwd",
      [](int batch, int seqlen, int heads, int head_dim, const std::string& dtype, Address dout,
         const Strides& dout_strides, Address dlse, const Strides& dlse_strides, Address out_a,
         const Strides& out_a_strides, Address lse_a, const Strides& lse_a_strides, Address out_b,
         const Strides& out_b_strides, Address lse_b, const Strides& lse_b_strides, Address dout_a,
         Address dlse_a, Address dout_b, Address dlse_b, Address stream) {
        MergeBwdParams params{};
        params.shape = {batch, seqlen, heads, head_dim, parse_dtype(dtype)};
        params.a = attn_state(out_a, out_a_strides, lse_a, lse_a_strides);
        params.b = attn_state(out_b, out_b_strides, lse_b, lse_b_strides);
        params.dout = reinterpret_cast<const void*>(dout);
        params.dlse = reinterpret_cast<const float*>(dlse);
        params.dout_strides = out_strides(dout_strides);
        params.dlse_strides = lse_strides(dlse_strides);
        params.dout_a = reinterpret_cast<void*>(dout_a);
        params.dlse_a = reinterpret_cast<float*>(dlse_a);
        params.dout_b = reinterpret_cast<void*>(dout_b);
        params.dlse_b = reinterpret_cast<float*>(dlse_b);
        params.stream = as_stream(stream);
        py::gil_scoped_release release;
        merge_attn_states_bwd(params);
      },
      py::kw_only(), "batch"_a, "seqlen"_a, "heads"_a, "head_dim"_a, "dtype"_a, "dout"_a,
      "dout_strides"_a, "dlse"_a, "dlse_strides"_a, "out_a"_a, "out_a_strides"_a, "lse_a"_a,
      "lse_a_strides"_a, "out_b"_a, "out_b_strides"_a, "lse_b"_a, "lse_b_strides"_a, "dout_a"_a,
      "dlse_a"_a, "dout_b"_a, "dlse_b"_a, "stream"_a);
}
