// What one launch gets: plain data, filled by bindings.cpp from Python's keyword arguments.
//
// Pointers are device pointers; a comment beside each gives its shape. Strides count elements and
// are 64-bit, because a view of 128K tokens passes 2^31 elements. The last dimension of everything
// called "out" has stride 1.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "attention/pattern.h"

namespace longgen {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat8 };  // the last e4m3

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

struct AttentionFwdParams {
  PatternParams pattern;
  // Sizes; packed, batch counts sequences and seqlen_q, seqlen_k are the total rows.
  int32_t batch, seqlen_q, seqlen_k, q_heads, kv_heads, head_dim;
  DType dtype;
  float softmax_scale;
  const void* q;  // (batch, seqlen_q, q_heads, head_dim), 16-byte aligned, as k and v
  const void* k;  // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;  // (batch, seqlen_k, kv_heads, head_dim)
  OutStrides q_strides, k_strides, v_strides;
  void* out;                    // (batch, seqlen_q, q_heads, head_dim), contiguous
  float* lse;                   // (batch, q_heads, seqlen_q), contiguous
  int32_t q_start, k_start;     // positions of the first rows, when not packed
  const int32_t* cu_seqlens_q;  // (batch + 1,), or nullptr: not packed; likewise cu_seqlens_k
  const int32_t* cu_seqlens_k;
  const int32_t* q_starts;  // (batch,), or nullptr: suffix-aligned
  const int32_t* k_starts;  // (batch,), or nullptr: 0
  // Or k and v are pools (pages, page_size, kv_heads, head_dim), page_size a power of two; key row
  // r of sequence b is in page block_table[b, r / page_size]. Where no sequence has more than one
  // page, any page_size from 16 on. Then packed, and cu_seqlens_k says only how many keys there
  // are. Without: block_table nullptr, and the sizes mean nothing.
  const int32_t* block_table;  // (batch, table_pages)
  int32_t pages, page_size, table_pages;
  cudaStream_t stream;
  // Set by the launch.
  float scale_log2;
  int32_t group, q_tiles, work_items, log2_box, log2_page;
};

// How the items of the backward kernel are numbered: first the key tiles that hold sink or strided
// keys, the longest, then the others; each by head, and packed, by slot (see packed_sequence).
// The others' last slots of all heads come at the end together: the shortest tiles of a causal
// pattern, which even out what each block has got.
struct BwdPlan {
  int32_t group;                      // query heads of a KV head
  int32_t q_tiles;                    // of a head; packed, slots
  int32_t heads;                      // of keys, of all sequences
  int32_t global_slots, local_slots;  // key tiles of a head
  int32_t last_slots;                 // of the local ones those that come at the end
  int32_t key_slack;                  // packed: slots that a sequence has beyond its length
  int32_t chunks, chunk_steps;        // a global tile's query tiles are shared out in chunks
  int32_t global_items, items;
  int32_t log2_box;  // consecutive keys that the copy engine fetches at once
  // Deterministic, dQ has a kernel of its own: tiles of 128 rows of a head.
  int32_t row_tiles, row_items;
};

// Sizes in elements.
struct BwdWorkspace {
  int64_t stats, dq_sum, partials;
};

struct AttentionBwdParams {
  PatternParams pattern;
  // Sizes; packed, batch counts sequences and seqlen_q, seqlen_k are the total rows.
  int32_t batch, seqlen_q, seqlen_k, q_heads, kv_heads, head_dim;
  DType dtype;
  float softmax_scale;
  const void* q;     // (batch, seqlen_q, q_heads, head_dim), 16-byte aligned, as all that follow
  const void* k;     // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;     // (batch, seqlen_k, kv_heads, head_dim)
  const void* out;   // (batch, seqlen_q, q_heads, head_dim)
  const void* dout;  // (batch, seqlen_q, q_heads, head_dim)
  OutStrides q_strides, k_strides, v_strides, out_strides, dout_strides;
  const float* lse;   // (batch, q_heads, seqlen_q), contiguous
  const float* dlse;  // (batch, q_heads, seqlen_q), or nullptr: 0
  LseStrides dlse_strides;
  void* dq;                     // (batch, seqlen_q, q_heads, head_dim), contiguous
  void* dk;                     // (batch, seqlen_k, kv_heads, head_dim), contiguous
  void* dv;                     // (batch, seqlen_k, kv_heads, head_dim), contiguous
  int32_t q_start, k_start;     // positions of the first rows, when not packed
  const int32_t* cu_seqlens_q;  // (batch + 1,), or nullptr: not packed; likewise cu_seqlens_k
  const int32_t* cu_seqlens_k;
  const int32_t* q_starts;  // (batch,), or nullptr: suffix-aligned
  const int32_t* k_starts;  // (batch,), or nullptr: 0
  int32_t multiprocessors;  // of the device
  int32_t deterministic;    // every sum in one order
  // Workspaces, written before they are read.
  float* stats;        // of query tiles: see sm90/bwd/statistics.cuh
  float* dq_sum;       // (heads and query tiles, 2, 64 * 64), as accumulators lie; nullptr if
                       // deterministic
  float* partials;     // (global items, 2, 128 * head_dim), likewise; nullptr without chunks
  int32_t* next_item;  // (1,)
  cudaStream_t stream;
  // Set by the launch.
  float scale_log2;
  BwdPlan plan;
};

// Strides of a (batch, kv_heads, slots, head_dim) cache, or of its (pages, kv_heads, page_size,
// head_dim) pages.
struct CacheStrides {
  int64_t block, head, slot;
};

// A KV cache. Position j of a sequence is in the slot that CacheSlots computes.
struct CacheParams {
  PatternParams pattern;  // causal
  int32_t ring;        // slots of the ring, a multiple of 16; -1: each token's slot is its position
  int32_t sink_slots;  // the sink rounded up to 16; 2^30 where everything is kept
  int32_t batch, kv_heads, head_dim;
  int32_t slots;  // that one sequence can have
  // Width of the block table, log2 of the page size, pages that there are.
  int32_t pages, log2_page, pool_pages;
  DType dtype;  // of queries and new tokens; and of k and v, which without CacheScales are the same
  void* k;      // (batch, kv_heads, slots, head_dim) or pages, 16-byte aligned; likewise v
  void* v;
  CacheStrides strides;        // of both
  int32_t* seqlens;            // (batch,)
  const int32_t* block_table;  // (batch, pages), or nullptr: no pages
};

// What the bytes of an fp8 cache are multiplied by; nullptr, the cache is not one.
struct CacheScales {
  const float* k;  // (kv_heads,), likewise v
  const float* v;
};

// Tokens that are appended.
struct NewTokensParams {
  const void* k;  // (batch, n, kv_heads, head_dim), or nullptr: none; 16-byte aligned, likewise v
  const void* v;
  OutStrides strides;     // of both
  int32_t n;              // 0 without new tokens
  const int32_t* counts;  // (batch,), or nullptr: n each
  int32_t advance;        // whether seqlens become longer
};

struct CacheAppendParams {
  CacheParams cache;
  NewTokensParams new_tokens;
  uint32_t* tickets;  // (batch,), zeros before and after; or nullptr without `advance`
  cudaStream_t stream;
  CacheScales scales;
};

struct DecodeParams {
  CacheParams cache;
  NewTokensParams new_tokens;  // their queries are q
  int32_t n, q_heads;
  int32_t q_offset;  // row i stands at seqlens + q_offset + i
  float softmax_scale;
  const void* q;  // (batch, n, q_heads, head_dim), 16-byte aligned
  OutStrides q_strides;
  void* out;       // (batch, n, q_heads, head_dim), contiguous
  float* lse;      // (batch, q_heads, n), contiguous
  int32_t splits;  // of a tile
  // On Hopper:
  int32_t starts_early;  // whether the kernel may start before the one ahead of it has ended
  int32_t bulk;         // whether it copies in bulk, where chunks are neighbouring slots; and then:
  int32_t whole_tiles;  // the first so many have one split all the same
  int32_t clustered;    // whether the splits, up to 8, are a cluster
  int32_t small_blocks;       // whether blocks are small: of 16 bits, head_dim up to 128
  int32_t persistent_blocks;  // which share out all work of up to 32 sequences evenly; 0: no
  // If blocks, neither clustered nor persistent, are fewer than run at once, or small ones more:
  // how many multiprocessors there are, up to 255; 0: whichever do what there is. And a bit for
  // each that has one block less than others, or none; or, if there are more, that is in one half
  // of the GPU.
  int32_t seats;
  uint64_t seat_bits[4];
  // Results of the splits, or nullptr where there is one or they are clustered: (tiles that are not
  // whole, splits, rows of a tile, head_dim), and 2 in place of the last dimension. Of persistent
  // blocks (blocks, 2, rows of a tile, head_dim), and likewise.
  float* part_out;
  float* part_weights;
  uint32_t* tickets;  // (batch + batch * kv_heads * row tiles,), zeros before and after
  // (1 + seats,), for blocks of one size: zeros at first, then as the kernel leaves them. If there
  // are more than run at once (3,), zeros before and after.
  uint32_t* seat_counts;
  cudaStream_t stream;
  // Set by the launch.
  float scale_log2;
  int32_t group, row_tiles;
  int32_t items;              // splits of all tiles
  uint32_t group_reciprocal;  // 2^16 / group, rounded up
  CacheScales scales;
};

struct MultiprocessorParams {
  int32_t multiprocessors, lines;
  int32_t stride;   // from one line to the next, in elements
  uint32_t* zeros;  // (lines * stride + 1,), before and after
  // (nbytes,), which are read, whatever they are: 8 KB at least, at a multiple of 16.
  const char* memory;
  int64_t nbytes;
  // In the host's memory.
  int32_t* latencies;  // (multiprocessors, lines), cycles
  int32_t* rates;      // (multiprocessors,), of as much that each has read
  int32_t* are_there;  // (1,), becomes 1 when they are
  cudaStream_t stream;
};

// Each enqueues its kernel on `stream` of the current device, allocates nothing, waits for nothing,
// and throws std::runtime_error when the launch fails. Empty shapes launch nothing.
void merge_attn_states(const MergeParams& params);
void merge_attn_states_bwd(const MergeBwdParams& params);
void attn_fwd_sm90(const AttentionFwdParams& params);
void attn_bwd_sm90(const AttentionBwdParams& params);

// What attn_bwd_sm90 needs for these sizes, pattern and multiprocessors; reads no pointer.
BwdWorkspace attn_bwd_sm90_workspace(const AttentionBwdParams& params);
void cache_append(const CacheAppendParams& params);
void attn_decode(const DecodeParams& params);
void measure_multiprocessors(const MultiprocessorParams& params);

// Rows of the query that a thread block of `attn_decode` has, given all rows of a KV head: what the
// sizes of part_out and tickets follow from.
int decode_rows_per_tile(int rows, int head_dim);

}  // namespace longgen
