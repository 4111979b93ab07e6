// Sizes and the shared-memory plan of the Hopper forward kernel.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"
#include "attention/box_tiles.cuh"

namespace longgen::sm90 {

// What the producer tells the math warpgroups about a work item, beside its Q.
struct ItemInfo {
  int head, batch;
  int q_row0, q_len, q_start;
  int p_tile;  // position of the tile's first row
};

// And about a key tile, beside its K.
struct TileInfo {
  static constexpr int kMasked = 1;   // some pair is not visible
  static constexpr int kLast = 2;     // of its item
  static constexpr int kForeign = 4;  // rows of other sequences are in it
  static constexpr int kEnd = 8;      // no tile: there is no more work
  static constexpr int kMaxBoxes = 8;
  KeyBox box[kMaxBoxes];
  struct {
    int lo, hi;
  } own_rows[kMaxBoxes];  // of each box, if some are of another sequence
  int flags;
};

// Position in a ring of stages, and the parity of its round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t round = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// Room for a tile of output, or none.
template <typename T, int kElements>
struct OutputRoom {
  alignas(1024) T out[kElements];
};
template <typename T>
struct OutputRoom<T, 0> {};

template <typename T_, int kHeadDim_>
struct FwdTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = 128;  // two math warpgroups of 64 query rows
  static constexpr int kBlockN = 128;
  // A tile of K is held until the weights of its scores are known to be good, which is long. At 64
  // a tile takes half the time and half the room: the copies need as much of a lead, in more tiles.
  static constexpr int kKeyStages = kHeadDim == 64 ? 5 : 3;
  static constexpr int kValueStages = kHeadDim == 64 ? 5 : 2;
  // Whether output is staged in a place of its own, where Q's needs a barrier and a fence: at 64
  // there is room for it.
  static constexpr bool kOutputRoom = kHeadDim == 64;
  static constexpr int kQueryStages = kHeadDim == 64 ? 3 : 2;
  // Whether a tile is asked for two tiles ahead, beside matrix products. It may be the first one of
  // the item after next, for whose Q there must be room.
  static constexpr bool kAskEarly = kQueryStages > 2;
  static constexpr int kMathWarpgroups = kBlockM / 64;
  static constexpr int kThreads = 128 * (1 + kMathWarpgroups);
  // A math thread holds 64 of scores, kHeadDim / 2 of output, 32 of probabilities. Together they
  // get no more than the launch gave: a warpgroup that asks for more waits for ever.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMathRegisters = 224;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kMathWarpgroups * kMathRegisters <=
                (1 + kMathWarpgroups) * kLaunchRegisters);
  // Rows are split in panels of 64 elements (128 bytes), the span of the swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr int kPanelElements = kBlockN * 64;
  static constexpr uint32_t kPanelBytes = kPanelElements * sizeof(T);
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static_assert(kHeadDim % 64 == 0, "a panel is 64 elements wide");
  static_assert(kBlockM == kBlockN, "Q, K and V tiles share one panel size");
  static_assert(sizeof(T) == 2, "wgmma takes transposed operands in 16-bit types only");

  struct Shared : OutputRoom<T, kOutputRoom ? kBlockM * kHeadDim : 0> {
    // Swizzled tiles repeat every 1024 bytes.
    // Of this item and the next; later its output, unless that has room of its own.
    alignas(1024) T q[kQueryStages][kBlockM * kHeadDim];
    alignas(1024) T k[kKeyStages][kBlockN * kHeadDim];
    alignas(1024) T v[kValueStages][kBlockN * kHeadDim];
    ItemInfo item[kQueryStages];
    TileInfo tile[kKeyStages];
    int redo[kMathWarpgroups][2];  // see MathWarpgroup::ask_for_redo
    Mbarrier q_full[kQueryStages], q_empty[kQueryStages];
    Mbarrier k_full[kKeyStages], k_empty[kKeyStages];
    Mbarrier v_full[kValueStages], v_empty[kValueStages];
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
};

}  // namespace longgen::sm90
