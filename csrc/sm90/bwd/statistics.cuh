// What the kernels have to know of query rows, the LSE in base 2 and delta, tile by tile as they
// read it: first LSE, then delta.
#pragma once

namespace longgen::sm90 {

// Floats of a tile's LSE, and of its delta.
__host__ __device__ constexpr int statistics_floats(int rows) { return rows + 16; }

// Where among them a row's is. A thread's columns of accumulators, two of every chunk of 8, are a
// run for 16-byte loads, and 16 bytes between the runs of a quad's threads put them into different
// banks.
template <int kRows>
__host__ __device__ constexpr int statistics_slot(int row) {
  return row % 8 / 2 * (kRows / 4 + 4) + row / 8 * 2 + row % 2;
}

// The floats between the runs, of which there are 16.
template <int kRows>
__host__ __device__ constexpr int statistics_gap(int i) {
  return i / 4 * (kRows / 4 + 4) + kRows / 4 + i % 4;
}

}  // namespace longgen::sm90
