// Sizes and the shared-memory plan of Hopper's decode kernel.
#pragma once

#include <cstdint>

#include "arch/sm90/barrier.cuh"
#include "attention/cache_slots.cuh"
#include "decode/found.cuh"
#include "decode/tile.cuh"
#include "sm90/decode/meeting.cuh"
#include "sm90/decode/task.cuh"

namespace longgen::sm90 {

// What thread blocks there are. Big: a multiprocessor holds one, with one split of one tile. Small:
// it holds two, for where there are more tiles than multiprocessors; one reads while another begins
// or ends. Small in a row: with seats, or some of the tiles split. Small by halves: more than run
// at once, of which each half of the GPU does half. Persistent: big ones, of which each reads as
// much as any other, of whichever tiles.
enum class Blocks { kBig, kSmall, kSmallInRow, kSmallByHalves, kPersistent };

// T is the type of queries and output, and of the matrix instructions; Cached is T or e4m3.
template <typename T_, typename Cached_, int kHeadDim_, int kOctets_, Blocks kKind_>
struct DecodeTraits {
  using T = T_;
  using Cached = Cached_;
  static constexpr int kBytes = sizeof(Cached);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kOctets = kOctets_;
  static constexpr bool kPlain = kKind_ == Blocks::kSmall;  // a tile each: its code is shorter
  static constexpr bool kByHalves = kKind_ == Blocks::kSmallByHalves;
  static constexpr bool kSmall = kPlain || kByHalves || kKind_ == Blocks::kSmallInRow;
  static constexpr bool kPersistent = kKind_ == Blocks::kPersistent;
  static constexpr int kBlocks = kSmall ? 2 : 1;  // of a multiprocessor
  static constexpr int kRows = 8 * kOctets;       // of the query: tokens times heads of a group
  static constexpr int kWarps = kSmall ? 5 : kHeadDim <= 128 ? 8 : 4;
  static constexpr int kAttendThreads = 32 * kWarps;
  // A persistent block has a warpgroup more, which merges. So many warps get fewer registers each
  // than those that attend to keys need: the others give away some.
  static constexpr int kMergers = 4;
  static constexpr int kThreads = kAttendThreads + (kPersistent ? 32 * kMergers : 0);
  static constexpr int kAttendRegisters = kOctets == 1 ? 200 : 208;
  static constexpr int kMergeRegisters = kPersistent && kWarps == 8 ? (kOctets == 1 ? 104 : 88) : 0;
  static constexpr int kAttendBarrier = 1, kMergeBarrier = 2;
  // Pairs of chunks that a block could read in the time in which it begins a tile: see Run.
  static constexpr int kBeginning = kOctets == 1 ? 6 : 16;
  static constexpr int kMaxCluster = kKind_ == Blocks::kBig ? 8 : 1;  // blocks

  // A chunk's keys, and its values, are copied in boxes of 16 rows of 128 bytes, or 64 where a row
  // has no more, and swizzled over that; of head_dim 96 the last is half zeros.
  static constexpr int kBoxElements = kHeadDim * kBytes < 128 ? kHeadDim : 128 / kBytes;
  static constexpr int kRowBytes = kBoxElements * kBytes;
  static constexpr int kBoxes = (kHeadDim + kBoxElements - 1) / kBoxElements;
  static constexpr int kBoxBytes = kChunk * kRowBytes;
  static constexpr int kChunkBytes = kBoxes * kBoxBytes;  // keys or values
  // A warp attends to neighbouring chunks at once, a row for each lane: it waits half as often, and
  // asks for more at once.
  static constexpr int kChunks = 2;
  static constexpr int kHalfBytes = kChunks * kChunkBytes;
  static constexpr int kStageBytes = 2 * kHalfBytes;
  // 128 KB on their way in a multiprocessor, or 160 in small blocks: less leaves memory idle, more
  // makes what a block waits for first arrive later.
  static constexpr int kStages = (kHeadDim <= 128 ? 16 : 32) * 1024 / kStageBytes;

  // Where a row's element lies from the first box. Pieces of 16 bytes are exchanged by the number
  // of the 128 bytes that they lie in, so that those of eight neighbouring rows are in different
  // banks.
  static __device__ __forceinline__ uint32_t swizzled(int row, int element) {
    return row / kChunk * kChunkBytes + element / kBoxElements * kBoxBytes +
           row % kChunk * kRowBytes +
           ((element % kBoxElements * kBytes) ^ (row * kRowBytes / 128 % (kRowBytes / 16) * 16));
  }

  // Of the queries' elements, the first of the 8 that lane 4 * g + c reads with its load `i`. Those
  // that it multiplies are the same where keys are converted, but in 16 bits 8 * k + 2 * c and the
  // next, of the same 32, as matrices are loaded.
  static __device__ __forceinline__ int query_element(int i, int c) {
    return kBytes == 1 ? kHeadDim / 4 * c + 8 * i : 32 * i + 8 * c;
  }

  struct Inputs {
    uint4 queries[kHeadDim / 32][kOctets][32];  // as the lanes of a warp hold them
    uint4 new_token[2][kHeadDim / 8];           // the first one's key and value
  };
  using Factors = decode::Factors<T, Cached>;
  using Found = decode::Found<kRows, kHeadDim>;
  // Elements of a row that a thread merges: 256 threads have a tile of head_dim 128, or 128 of a
  // small block's 160, which would otherwise go over it twice.
  static constexpr int kEach = (kSmall ? 8 : 4) * kOctets;
  // Parts that are read at once to be merged, as many as fit in registers: on 132 multiprocessors 8
  // heads have up to 18.
  static constexpr int kPartsAtOnce = kSmall         ? 4 / kOctets
                                      : kPersistent  ? 8 / kOctets
                                      : kOctets == 1 ? 20
                                                     : 16;
  // Stages of all warps, and one more of the last.
  static constexpr int kAllStages = kWarps * kStages + 1;
  struct Shared {
    alignas(1024) char ring[kAllStages][kStageBytes];  // in the end each warp's Found
    Found found[kPersistent ? kWarps : 1];  // of persistent blocks, whose ring is filled again
    Inputs inputs[kPersistent ? 2 : 1];
    // (block, pair of this block's slice): slices are powers of 2, and together less than twice the
    // power of 2 that holds all pairs.
    float2 part_out[kMaxCluster == 1 ? 1 : kRows * kBoxes * kBoxElements];
    float2 part_weights[kMaxCluster][kRows];
    Mbarrier merged;
    int item;    // of the seat, or of the half
    int2 split;  // which, of how many
    // Of a persistent block, with each warp's tasks, which take up no registers here: the next one
    // or the last; of those that merge, three by number.
    Meeting<kWarps, kMergers> meeting;
    Task last_tasks[kPersistent ? kWarps : 1];
    Task merged_tasks[kPersistent ? kMergers : 1][3];
    Mbarrier full[kAllStages][2];  // of keys, of values
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kMergers == 4, "registers are a warpgroup's");
  static_assert(256 * kAttendRegisters + 128 * kMergeRegisters <= 384 * 168, "who takes must get");
  static_assert(kChunks * kChunk == 32, "each lane has a row");
  static_assert(kBytes == 2 || kHeadDim % 64 == 0, "four lanes read 16 bytes of a key each");
  static_assert(kBlocks * (kSharedBytes + 1024) <= 228 * 1024, "a multiprocessor has no more");
  static_assert(sizeof(Found) <= kStages * kStageBytes, "it takes the ring's place");
};

}  // namespace longgen::sm90
