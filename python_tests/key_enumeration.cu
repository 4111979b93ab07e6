// csrc's enumeration of work, and of the keys that a query tile visits, on the CPU: for
// test_key_enumeration.py.
#include <cstdint>
#include <vector>

#include "attention/box_tiles.cuh"
#include "host_pattern.cuh"
#include "sm90/work.cuh"

using namespace longgen;

// Adds to seen[r, j] how often row r of the 128-row tile at p_tile, which holds queries p_first to
// p_last, is shown the key j of positions k_start to k_start + k_len - 1. Returns 0, or what
// is wrong.
extern "C" int enumerate(const int32_t* code, const int32_t* mask_rows, int log2_box, int p_tile,
                         int p_first, int p_last, int k_start, int k_len, int head, int heads,
                         int32_t* seen) {
  const PatternParams pattern = decode(code, mask_rows, nullptr);
  const KeyBoxes boxes(pattern, log2_box, p_first, p_last, k_start, k_start + k_len, head, heads,
                       head);
  if (boxes.empty()) return 0;

  const int boxes_per_tile = 128 >> log2_box;
  std::vector<BoxTiles> tiles(boxes_per_tile, BoxTiles(boxes, boxes_per_tile));  // one a lane
  for (int visited = 0; !tiles[0].done(); ++visited) {
    if (visited > 10000) return 1;  // does not end
    bool masked = false;
    std::vector<KeyBox> tile;
    for (int b = 0; b < boxes_per_tile; ++b) {
      const Box box = tiles[b].next(b);
      masked |= box.masked;
      tile.push_back(key_box(boxes, box));
    }
    for (const BoxTiles& other : tiles)
      if (other.done() != tiles[0].done()) return 2;  // lanes disagree
    const auto box_of = [&](int b) { return tile[b]; };
    for (int row = 0; row < 128; ++row) {
      const int p = p_tile + row;
      for (int word = 0; word < 4; ++word) {
        const uint32_t bits = masked ? visible_bits_of_tile(pattern, box_of, log2_box, word, p,
                                                            window_lo(pattern, p), row / 64)
                                     : ~0u;
        for (int i = 0; i < 32; ++i) {
          if (!(bits >> i & 1)) continue;
          const int key = word * 32 + i, in_box = key & ((1 << log2_box) - 1);
          const int j = tile[key >> log2_box].position + in_box - k_start;
          if (j < 0 || j >= k_len) return 3;  // shows a key that does not exist
          ++seen[row * k_len + j];
        }
      }
    }
  }
  return 0;
}

// Lists the key tiles of the 128-row query tile at p_tile, of a causal sequence of k_len tokens, in
// the order of their visits: the position of each box, and whether the tile is masked. Returns how
// many they are.
extern "C" int list_tiles(const int32_t* code, int log2_box, int p_tile, int k_len,
                          int32_t* positions, int32_t* masked) {
  const PatternParams pattern = decode(code, nullptr, nullptr);
  const KeyBoxes boxes(pattern, log2_box, p_tile, p_tile + 127, 0, k_len, 0, 1, 0);
  const int boxes_per_tile = 128 >> log2_box;
  std::vector<BoxTiles> tiles(boxes_per_tile, BoxTiles(boxes, boxes_per_tile));  // one a lane
  int visited = 0;
  for (; !tiles[0].done(); ++visited) {
    masked[visited] = 0;
    for (int b = 0; b < boxes_per_tile; ++b) {
      const Box box = tiles[b].next(b);
      positions[visited * boxes_per_tile + b] = box.position;
      masked[visited] |= box.masked;
    }
  }
  return visited;
}

// Counts in items[batch, head, tile] how often the grid's list has each query tile.
extern "C" void list_work(int batch, int heads, int q_tiles, int32_t* items) {
  AttentionFwdParams params{};
  params.batch = batch;
  params.q_heads = heads;
  params.seqlen_q = q_tiles * 128;
  for (int index = 0; index < batch * heads * q_tiles; ++index) {
    const auto work = sm90::work_item<128>(params, q_tiles, index);
    ++items[(work.batch * heads + work.head) * q_tiles + work.p_tile / 128];
  }
}
