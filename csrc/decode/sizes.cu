// What the callers of `attn_decode` have to know of its sizes.
#include <cstdint>

#include "decode/traits.cuh"

namespace longgen {
namespace {

template <int kHeadDim, int kRowGroups>
constexpr int least_bytes() {
  using Traits = decode::DecodeTraits<uint16_t, kHeadDim, kRowGroups>;
  return Traits::shared_bytes(Traits::kMinStages);
}

}  // namespace

int decode_rows_per_tile(int rows, int head_dim) { return rows > 16 && head_dim <= 128 ? 32 : 16; }

int decode_shared_bytes(int rows, int head_dim) {
  const bool wide = decode_rows_per_tile(rows, head_dim) == 32;
  switch (head_dim) {
    case 64:
      return wide ? least_bytes<64, 2>() : least_bytes<64, 1>();
    case 96:
      return wide ? least_bytes<96, 2>() : least_bytes<96, 1>();
    case 128:
      return wide ? least_bytes<128, 2>() : least_bytes<128, 1>();
    default:
      return least_bytes<256, 1>();
  }
}

}  // namespace longgen
