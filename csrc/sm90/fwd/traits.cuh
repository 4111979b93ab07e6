// Sizes and the shared-memory plan of the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"

namespace longgen::sm90 {

template <typename T_, int kHeadDim_>
struct FwdTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 128;  // two math warpgroups of 64 query rows
  static constexpr int kBlockN = 128;
  static constexpr int kStages = 2;  // of K and of V each
  static constexpr int kMathWarpgroups = kBlockM / 64;
  static constexpr int kThreads = 128 * (1 + kMathWarpgroups);
  // Budget: 65536 registers / 128 threads = 512 for three warpgroups. A math thread holds 64 of
  // scores, kHeadDim / 2 of output, 32 of probabilities.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kMathRegisters = 240;
  // Rows are split in panels of 64 elements (128 bytes), the span of the swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelElements = kBlockN * 64;
  static constexpr uint32_t kPanelBytes = kPanelElements * sizeof(T);
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static_assert(kHeadDim % 64 == 0, "a panel is 64 elements wide");
  static_assert(kBlockM == kBlockN, "Q, K and V tiles share one panel size");
  static_assert(sizeof(T) == 2, "wgmma takes transposed operands in 16-bit types only");

  struct Shared {
    // Swizzled tiles repeat every 1024 bytes.
    alignas(1024) T q[kBlockM * kHeadDim];
    alignas(1024) T k[kStages][kBlockN * kHeadDim];
    alignas(1024) T v[kStages][kBlockN * kHeadDim];
    alignas(16) T out[kBlockM * kHeadDim];
    float anchors[kMathWarpgroups * 128];  // written, never read: see MathWarpgroup::anchor
    Mbarrier q_full, q_empty;
    Mbarrier k_full[kStages], k_empty[kStages];
    Mbarrier v_full[kStages], v_empty[kStages];
  };
  static constexpr int kSharedBytes =
      sizeof(Shared) + 1024;  // dynamic shared memory is aligned to 16 bytes only
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
};

}  // namespace longgen::sm90
