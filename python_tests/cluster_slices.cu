// How the blocks of a cluster of Hopper's decode kernel share out what they merge, on the CPU; for
// test_cluster_slices.py.
#include <cuda_fp8.h>

#include <vector>

#include "sm90/decode/slices.cuh"
#include "sm90/decode/traits.cuh"

using namespace longgen;
using namespace longgen::sm90;

namespace {

// 0, or what is wrong. `into[b]` counts what is written to each place of block b's part_out.
template <typename Traits>
int check() {
  constexpr int kPlaces = sizeof(Traits::Shared::part_out) / sizeof(float2);
  for (int blocks = 2; blocks <= Traits::kMaxCluster; ++blocks) {
    for (int rows = 1; rows <= Traits::kRows; ++rows) {
      const Slices slices = Slices::of(rows * Traits::kHeadDim / 2, blocks);
      std::vector<std::vector<int>> into(blocks, std::vector<int>(kPlaces));
      for (int from = 0; from < blocks; ++from) {
        for (int pair = 0; pair < slices.pairs; ++pair) {
          const int owner = slices.owner(pair);
          if (owner < 0 || owner >= blocks) return 1;
          const int place = slices.first(from) + pair - slices.first(owner);
          if (place < 0 || place >= kPlaces) return 2;
          if (++into[owner][place] > 1) return 3;
        }
      }
      int all = 0;
      for (int block = 0; block < blocks; ++block) {
        all += slices.size(block);
        int written = 0;
        for (const int times : into[block]) written += times;
        if (written != blocks * slices.size(block)) return 4;  // what its mbarrier waits for
        for (int from = 0; from < blocks; ++from)
          for (int i = 0; i < slices.size(block); ++i)
            if (into[block][slices.first(from) + i] != 1) return 5;  // read, but not written
      }
      if (all != slices.pairs) return 6;
    }
  }
  return 0;
}

template <typename Cached, int kHeadDim>
int check_rows() {
  int wrong = check<DecodeTraits<__nv_bfloat16, Cached, kHeadDim, 1, Blocks::kBig>>();
  if constexpr (kHeadDim <= 128) {
    if (wrong == 0) wrong = check<DecodeTraits<__nv_bfloat16, Cached, kHeadDim, 2, Blocks::kBig>>();
  }
  return wrong;
}

}  // namespace

extern "C" int check_slices(int head_dim, bool fp8) {
  if (fp8)
    return head_dim == 64 ? check_rows<__nv_fp8_e4m3, 64>() : check_rows<__nv_fp8_e4m3, 128>();
  switch (head_dim) {
    case 64:
      return check_rows<__nv_bfloat16, 64>();
    case 96:
      return check_rows<__nv_bfloat16, 96>();
    case 128:
      return check_rows<__nv_bfloat16, 128>();
    default:
      return check_rows<__nv_bfloat16, 256>();
  }
}
