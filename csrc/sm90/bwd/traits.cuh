// Sizes and the shared-memory plan of the Hopper backward kernel.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"
#include "sm90/bwd/items.cuh"
#include "sm90/bwd/statistics.cuh"

namespace longgen::sm90 {

// What the math warpgroups need to know of a query tile.
struct Step {
  int p_tile;   // position of its first row; may lie before the sequence
  int q_tile;   // among all heads' query tiles
  bool masked;  // whether some (query, key) pair of it is not visible
};

// A key of a tile.
struct KeyRow {
  int row;   // in the tensor; -1: the tile has no key here
  Run seen;  // the positions of the queries that see it
};

// What the producer keeps in mind, in shared memory: it has few registers.
template <int kQueryTile>
struct Stream {
  uint32_t n;     // items so far
  uint32_t step;  // of the Q and dO pipelines
  int next_item;
  int head;                      // of queries
  int skipped, left;             // steps before the item's first one, and to go
  int q_tile0;                   // number of the head's tile 0 among all heads' query tiles
  QueryTiles<kQueryTile> tiles;  // of the head
};

// The 64 x 64 elements of a query tile's dQ that a math warpgroup computes: at head_dim 128 some of
// the columns, at head_dim 64 some of the rows.
template <int kHeadDim>
struct DqPart {
  static constexpr int kFloats = 64 * 64;
  static constexpr int kAcross = kHeadDim / 64;  // parts side by side
  int row, column;                               // its first ones

  __device__ __forceinline__ explicit DqPart(int index)
      : row(index / kAcross * 64), column(index % kAcross * 64) {}
};

// With kAddsDq each block adds its part of dQ to the sums in memory.
template <typename T_, int kHeadDim_, bool kAddsDq_>
struct BwdTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kAddsDq = kAddsDq_;
  static constexpr int kBlockM = query_rows(kHeadDim);
  static constexpr int kBlockN = kKeyTile;  // two math warpgroups of 64 keys
  // Q is held from the scores of its tile, issued a tile ahead, to its dK; dO for one tile.
  static constexpr int kQStages = 3;
  static constexpr int kDoutStages = 2;
  static constexpr int kMathWarpgroups = kBlockN / 64;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kThreads = 128 * (1 + kMathWarpgroups);
  static constexpr int kLoaderThreads = 96;  // of the producer warpgroup: they fetch keys
  // Budget: a block gets 168 registers a thread (65536 / 384, in steps of 8), 504 for one thread of
  // each warpgroup, and no more when they move. A math thread holds kHeadDim of dK and dV,
  // kBlockM / 2 of scores, as many of dP or 32 of dQ, kBlockM / 4 of P, and of LSE, delta or dS.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kMathRegisters = 240;
  static_assert(kProducerRegisters + kMathWarpgroups * kMathRegisters <= 504);
  // Whether the scores of a tile fit beside dP of the tile before, its P, and all else.
  static constexpr bool kTwoTilesFit = kHeadDim + kBlockM + kBlockM / 4 + 24 <= kMathRegisters;
  // Rows are split in panels of 64 elements (128 bytes), the span of the swizzle.
  static constexpr int kPanels = kHeadDim / 64;
  static constexpr uint32_t kQueryPanelBytes = kBlockM * 128;
  static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr uint32_t kKeyPanelBytes = kBlockN * 128;
  static constexpr uint32_t kKeyBytes = kPanels * kKeyPanelBytes;
  static constexpr int kStatsFloats = statistics_floats(kBlockM);  // LSE or delta
  static constexpr uint32_t kStatsBytes = kStatsFloats * sizeof(float);
  static constexpr int kDqFloats = kBlockM * kHeadDim;  // dQ of a tile
  static constexpr int kDqFloatsOfWarp = kDqFloats / kMathWarps;
  static_assert(kDqFloats == kMathWarpgroups * DqPart<kHeadDim>::kFloats, "a part for each");
  static_assert(sizeof(T) == 2, "wgmma takes transposed operands in 16-bit types only");

  struct Shared {
    // Swizzled tiles repeat every 1024 bytes.
    alignas(1024) uint8_t k[kKeyBytes];
    alignas(1024) uint8_t v[kKeyBytes];
    alignas(1024) uint8_t q[kQStages][kQueryBytes];
    alignas(1024) uint8_t dout[kDoutStages][kQueryBytes];
    alignas(1024) uint8_t ds[2][kBlockM * kBlockN * sizeof(T)];
    alignas(128) float dq[kMathWarps][kDqFloatsOfWarp];
    alignas(16) float lse[kQStages][kStatsFloats];
    alignas(16) float delta[kDoutStages][kStatsFloats];
    KeyRow rows[2][kBlockN];  // for two items
    Item items[2];
    Step steps[kQStages];
    Stream<kBlockM> stream;
    uint32_t loads[kLoaderThreads / 32];  // of items, by each of these warps
    AttentionBwdParams params;  // for the producer: what follows from them it is to compute anew
    Mbarrier item_full[2], item_empty[2];
    Mbarrier k_full, v_full, keys_empty;
    Mbarrier q_full[kQStages], q_empty[kQStages];
    Mbarrier dout_full[kDoutStages], dout_empty[kDoutStages];
    Mbarrier ds_full;
  };
  static constexpr int kSharedBytes =
      sizeof(Shared) + 1024;  // dynamic shared memory is aligned to 16 bytes only
  static_assert(kSharedBytes <= 227 * 1024, "more shared memory than a block can have");
};

}  // namespace longgen::sm90
