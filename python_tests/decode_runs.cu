// How blocks of Hopper's persistent decode kernel share out all tiles, on the CPU; for
// test_decode_runs.py.
#include <vector>

#include "sm90/decode/run.cuh"

using namespace longgen::sm90;

constexpr int kBeginning = 6;

// 0, or what is wrong. Tile t has pairs[t] pairs of chunks, and places for places[t] of them.
extern "C" int check_runs(int tiles, const int* pairs, const int* places, int blocks) {
  std::vector<int> start(tiles + 1);
  std::vector<std::vector<int>> reads(tiles);    // how often each pair is read
  std::vector<std::vector<int>> writers(tiles);  // of each part, in the order of parts
  for (int t = 0; t < tiles; ++t) {
    start[t + 1] = start[t] + places[t] + kBeginning;
    reads[t].resize(pairs[t]);
  }
  std::vector<int> parts(tiles, -1), written(2 * blocks);
  for (int block = 0; block < blocks; ++block) {
    Run<kBeginning> run(start[tiles], blocks, block);
    int t = 0;
    if (!run.empty()) {
      while (start[t + 1] <= run.next()) ++t;
      run.go_on(start[t], start[t + 1]);
    }
    while (!run.empty()) {
      const Piece piece = run.piece(block, start[t], start[t + 1], pairs[t]);
      if (piece.pairs.first < 0 || piece.pairs.last > pairs[t]) return 1;
      for (int pair = piece.pairs.first; pair < piece.pairs.last; ++pair) ++reads[t][pair];
      if (parts[t] < 0) parts[t] = piece.parts;
      if (parts[t] != piece.parts) return 3;
      writers[t].push_back(piece.part);
      if (piece.parts > 1) {
        const int place = piece.place_of(piece.part);
        if (place < 0 || place >= 2 * blocks || ++written[place] > 1) return 4;
      }
      ++t;
      run.go_on(start[t], t < tiles ? start[t + 1] : start[t] + 1);
    }
  }
  for (int t = 0; t < tiles; ++t) {
    for (const int times : reads[t])
      if (times != 1) return 5;
    if (int(writers[t].size()) != parts[t]) return 6;  // what its last block counts up to
    for (int p = 0; p < parts[t]; ++p)
      if (writers[t][p] != p) return 7;
  }
  return 0;
}

// The same of equal tiles. Tile t has pairs[t] pairs, where the first one's were expected.
extern "C" int check_equal_tiles(int tiles, const int* pairs, int blocks, int octets,
                                 int* longest) {
  const EqualTiles equal = EqualTiles::of(tiles, pairs[0], blocks, octets);
  const int places = (equal.begun > 0 ? equal.begun : pairs[0]) + kBeginning;
  std::vector<std::vector<int>> reads(tiles);
  std::vector<int> parts(tiles, -1), ended(tiles), written(2 * blocks);
  std::vector<std::vector<int>> seen(tiles);
  *longest = 0;
  for (int t = 0; t < tiles; ++t) reads[t].resize(pairs[t]);
  for (int block = 0; block < blocks; ++block) {
    int read = 0;
    const auto note = [&](int t, const Piece& piece) {
      if (piece.pairs.first < 0 || piece.pairs.last > pairs[t]) return 1;
      for (int pair = piece.pairs.first; pair < piece.pairs.last; ++pair) ++reads[t][pair];
      read += piece.pairs.last - piece.pairs.first;
      if (parts[t] < 0) parts[t] = piece.parts, seen[t].resize(piece.parts);
      if (parts[t] != piece.parts) return 3;
      if (piece.part < 0 || piece.part >= piece.parts || ++seen[t][piece.part] > 1) return 2;
      if (piece.parts > 1) {
        const int place = piece.place_of(piece.part);
        if (place < 0 || place >= 2 * blocks || ++written[place] > 1) return 4;
      }
      ++ended[t];
      return 0;
    };
    Run<kBeginning> run(equal.shared * places, equal.sharers, block);
    int t = run.empty() ? 0 : run.next() / places;
    if (!run.empty()) run.go_on(t * places, (t + 1) * places);
    for (; !run.empty(); run.go_on(t * places, (t + 1) * places)) {
      const Piece of_run =
          run.piece(block, t * places, (t + 1) * places, equal.shared_of(pairs[t]));
      const int first_block = run.first_block(t * places, (t + 1) * places);
      const int error = note(t, equal.shared_piece(of_run, first_block, t, tiles));
      if (error != 0) return error;
      ++t;
    }
    for (int left = equal.from_own(block, tiles); left > 0; left -= blocks) {
      t = tiles - left;
      const Piece of_run =
          run.piece(block, t * places, (t + 1) * places, equal.shared_of(pairs[t]));
      const int first_block = run.first_block(t * places, (t + 1) * places);
      const int error = note(t, equal.own_piece(of_run, first_block, t, tiles, pairs[t]));
      if (error != 0) return error;
    }
    *longest = read > *longest ? read : *longest;
  }
  for (int t = 0; t < tiles; ++t) {
    for (const int times : reads[t])
      if (times != 1) return 5;
    if (ended[t] != parts[t]) return 6;
  }
  return 0;
}

// How many places the longest and the shortest run have.
extern "C" void runs(int places, int blocks, int* longest, int* shortest) {
  *longest = 0;
  *shortest = places;
  for (int block = 0; block < blocks; ++block) {
    Run<kBeginning> run(places, blocks, block);
    const int first = run.next();
    int size = 0;
    while (!run.empty()) {
      ++size;
      run.go_on(first + size, first + size + 1);
    }
    *longest = size > *longest ? size : *longest;
    *shortest = size < *shortest ? size : *shortest;
  }
}
