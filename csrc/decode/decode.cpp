// Picks the instantiation. Each is compiled in a file of its own, so that they compile in parallel,
// and found by the linker.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <stdexcept>
#include <string>

#include "decode/grid.h"
#include "params.h"

namespace longgen {

#ifdef LONGGEN_SM90
namespace sm90 {

template <typename T, typename Cached, int kHeadDim>
void launch_decode(const DecodeParams& params);

}  // namespace sm90
#endif

namespace decode {

template <typename T, int kHeadDim>
void launch_decode(const DecodeParams& params);

template <typename T, int kHeadDim>
void launch_on(const DecodeParams& params) {
  const bool fp8 = params.scales.k != nullptr;
#ifdef LONGGEN_SM90
  if constexpr (kHeadDim == 64 || kHeadDim == 128) {
    if (params.bulk && fp8) return sm90::launch_decode<T, __nv_fp8_e4m3, kHeadDim>(params);
  }
  if (params.bulk && !fp8) return sm90::launch_decode<T, T, kHeadDim>(params);
#endif
  // Where there are no slots, there are no bytes of either type.
  if (fp8 && params.cache.slots > 0)
    throw std::invalid_argument("fp8 caches are for Hopper's kernel, with head_dim 64 and 128");
  launch_decode<T, kHeadDim>(params);
}

template <typename T>
void of_head_dim(const DecodeParams& params) {
  switch (params.cache.head_dim) {
    case 64:
      return launch_on<T, 64>(params);
    case 96:
      return launch_on<T, 96>(params);
    case 128:
      return launch_on<T, 128>(params);
    case 256:
      return launch_on<T, 256>(params);
    default:
      throw std::invalid_argument("head_dim is " + std::to_string(params.cache.head_dim) +
                                  "; the kernel was built for 64, 96, 128 and 256");
  }
}

// How many seats have a bit; -1: some that there are not.
int64_t marked_seats(const DecodeParams& params) {
  int64_t count = 0;
  for (int i = 0; i < 256; ++i) {
    if ((params.seat_bits[i / 64] >> i % 64 & 1) == 0) continue;
    if (i >= params.seats) return -1;
    ++count;
  }
  return count;
}

void check_blocks(const DecodeParams& params) {
  constexpr int kMaxSplits = 128, kMaxSequences = 32;
  constexpr int kMaxSeats = 255;  // twice so many are counted to 2^23 times in 32 bits
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  };
  const bool persistent = params.persistent_blocks > 0;
  const bool plain = params.bulk && !params.clustered && !persistent;
  demand(params.splits >= 1 && params.splits <= kMaxSplits, "splits must be from 1 to 128");
  demand(!persistent || params.cache.batch <= kMaxSequences,
         "persistent blocks are for up to 32 sequences");
  if (params.whole_tiles != 0) {
    demand(params.whole_tiles > 0 && params.whole_tiles < tiles_of(params),
           "fewer tiles than there are may be whole");
    demand(plain, "whole tiles before others are for blocks neither clustered nor persistent");
  }
  if (params.seats == 0) return;
  const bool small =
      params.small_blocks && params.cache.head_dim <= 128 && params.scales.k == nullptr;
  demand(plain, "seats are for blocks that are neither clustered nor persistent");
  demand(params.seats > 0 && params.seats <= kMaxSeats, "there may be up to 255 seats");
  const int64_t blocks = blocks_of(params), more = blocks % params.seats;
  const int64_t marked = marked_seats(params);
  demand(marked >= 0, "there is a bit for a seat that there is not");
  demand(small || blocks < params.seats,
         "there must be a seat for each big block, and for one more");
  demand(blocks > 2 * int64_t{params.seats} || marked == (more == 0 ? 0 : params.seats - more),
         "as many must stay idle as there are more seats than blocks");
}

}  // namespace decode

int decode_rows_per_tile(int rows, int head_dim) { return rows > 8 && head_dim <= 128 ? 16 : 8; }

void attn_decode(const DecodeParams& given) {
  if (given.cache.batch == 0 || given.n == 0) return;
  DecodeParams params = given;
  params.group = params.q_heads / params.cache.kv_heads;
  params.group_reciprocal = (65536 + params.group - 1) / params.group;
  const int rows = params.n * params.group;
  const int rows_per_tile = decode_rows_per_tile(rows, params.cache.head_dim);
  params.row_tiles = (rows + rows_per_tile - 1) / rows_per_tile;
  decode::check_blocks(params);
  params.items = decode::blocks_of(params);
  params.scale_log2 = params.softmax_scale * 1.4426950408889634f;
  switch (params.cache.dtype) {
    case DType::kFloat16:
      return decode::of_head_dim<__half>(params);
    case DType::kBFloat16:
      return decode::of_head_dim<__nv_bfloat16>(params);
    default:
      throw std::invalid_argument("the kernel takes float16 and bfloat16");
  }
}

}  // namespace longgen
