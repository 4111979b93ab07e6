// What a warp has found, on its way to where it is merged.
#pragma once

namespace longgen::decode {

// Of a tile's rows: outputs, not divided by the sums of their weights, which are relative to
// 2^offset; -inf where the row saw nothing.
template <int kRows, int kHeadDim>
struct Found {
  static constexpr int kStride = kHeadDim + 4;  // neighbouring rows begin in different banks
  alignas(16) float out[kRows * kStride];
  float offset[kRows];
  float sum[kRows];
};

}  // namespace longgen::decode
