// Merging what the warps, and then the splits, have found: attention of the same rows to different
// keys. Always in the same order.
#pragma once

#include "arch/pack.cuh"
#include "arch/sm80/keep_in_cache.cuh"
#include "attention/softmax.cuh"
#include "decode/append.cuh"
#include "decode/tile.cuh"

namespace longgen::decode {

// Neighbouring elements of a row, which are read and written at once.
template <int kSize>
struct alignas(4 * kSize) Neighbours {
  float at[kSize];
};
// Elements of a row's output that a thread has, not divided by the sum of the row's weights, which
// are relative to 2^offset: -inf where the row saw nothing. They are groups of up to four
// neighbours, kApart from each other: so what the threads of a warp read at once are neighbours
// too.
template <int kHeadDim, int kElements_>
struct Part {
  static constexpr int kElements = kElements_;
  static constexpr int kSize = kElements < 4 ? kElements : 4;  // of a group
  static constexpr int kGroups = kElements / kSize;
  static constexpr int kApart = kHeadDim / kGroups;

  float offset = -INFINITY, sum = 0.f;
  Neighbours<kSize> groups[kGroups] = {};

  __device__ __forceinline__ float& out(int i) { return groups[i / kSize].at[i % kSize]; }
  __device__ __forceinline__ float out(int i) const { return groups[i / kSize].at[i % kSize]; }
};

// Reads the parts, kAtOnce of them without waiting for each other, and adds them up.
template <int kAtOnce, typename Read>
__device__ __forceinline__ auto merge(int parts, Read read) {
  using Part = decltype(read(0));
  Part all;
#pragma unroll 1
  for (int first = 0; first < parts; first += kAtOnce) {
    Part next[kAtOnce];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (first + p < parts) next[p] = read(first + p);
    }
    const float before = all.offset;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) all.offset = fmaxf(all.offset, next[p].offset);
    // What exponents are relative to: never -inf. NaN is in the sums, and stays there.
    const float offset = all.offset == -INFINITY ? 0.f : all.offset;
    const float rescale = fast_exp2(before - offset);
    all.sum *= rescale;
#pragma unroll
    for (int i = 0; i < Part::kElements; ++i) all.out(i) *= rescale;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      const float weight = fast_exp2(next[p].offset - offset);
      all.sum += weight * next[p].sum;
#pragma unroll
      for (int i = 0; i < Part::kElements; ++i) all.out(i) += weight * next[p].out(i);
    }
  }
  return all;
}

// Calls f(row, column) for each Part of a tile, whose first element is there: each of a team's
// threads has some.
template <typename Part, typename Team, typename F>
__device__ __forceinline__ void for_parts(const Tile& tile, Team team, F f) {
  constexpr int kOfRow = Part::kApart / Part::kSize;
#pragma unroll 1
  for (int i = team.index(); i < tile.rows * kOfRow; i += team.size())
    f(i / kOfRow, i % kOfRow * Part::kSize);
}

// A warp's find as a part.
template <typename Part, typename Found>
__device__ __forceinline__ Part part_of(const Found& found, int row, int column) {
  Part part{found.offset[row], found.sum[row]};
#pragma unroll
  for (int i = 0; i < Part::kGroups; ++i)
    part.groups[i] = *reinterpret_cast<const Neighbours<Part::kSize>*>(
        found.out + row * Found::kStride + column + i * Part::kApart);
  return part;
}

// Stores a row's output, times `factor`, and LSE; 0 and -inf where it saw nothing.
template <typename T, typename Part>
__device__ __forceinline__ void store_result(const DecodeParams& params, const Tile& tile, int row,
                                             int column, const Part& all, float factor) {
  constexpr float kLn2 = 0.6931471805599453f;
  const int token = tile.token(params, row), head = tile.head(params, row);
  const float share = all.sum != 0.f ? 1.f / all.sum * factor : 0.f;
  T* const out = static_cast<T*>(params.out) +
                 ((int64_t(tile.sequence) * params.n + token) * params.q_heads + head) *
                     params.cache.head_dim +
                 column;
#pragma unroll
  for (int i = 0; i < Part::kGroups; ++i) {
    const auto& x = all.groups[i].at;
    struct alignas(2 * Part::kSize) {
      uint32_t pairs[Part::kSize / 2];
    } rounded;
#pragma unroll
    for (int e = 0; e < Part::kSize; e += 2)
      rounded.pairs[e / 2] = pack<T>(x[e] * share, x[e + 1] * share);
    *reinterpret_cast<decltype(rounded)*>(out + i * Part::kApart) = rounded;
  }
  if (column == 0)
    params.lse[(int64_t(tile.sequence) * params.q_heads + head) * params.n + token] =
        all.sum != 0.f ? (all.offset + log2f(all.sum)) * kLn2 : -INFINITY;
}

// The parts of splits on their way through global memory, which the level-2 cache is to keep until
// then: half a percent of what is read, they took 2 to 4% of the time when they went to memory.
// Other blocks write them in the same launch, so they are read past the level-1 cache.
template <typename Traits>
class GlobalParts {
 public:
  using Part = decode::Part<Traits::kHeadDim, Traits::kEach>;

  __device__ explicit GlobalParts(const DecodeParams& params)
      : out_(params.part_out), weights_(reinterpret_cast<float2*>(params.part_weights)) {}

  __device__ __forceinline__ void store(int64_t place, int row, int column,
                                        const Part& part) const {
    const int64_t i = place * Traits::kRows + row;
#pragma unroll
    for (int j = 0; j < Part::kGroups; ++j)
      sm80::store_to_keep(out_ + i * Traits::kHeadDim + column + j * Part::kApart,
                          part.groups[j].at);
    if (column == 0) sm80::store_to_keep(weights_ + i, part.offset, part.sum);
  }

  __device__ __forceinline__ Part load(int64_t place, int row, int column) const {
    const int64_t i = place * Traits::kRows + row;
    const float2 weights = __ldcg(weights_ + i);
    Part part{weights.x, weights.y};
#pragma unroll
    for (int j = 0; j < Part::kGroups; ++j)
      *reinterpret_cast<float4*>(part.groups + j) = __ldcg(
          reinterpret_cast<const float4*>(out_ + i * Traits::kHeadDim + column + j * Part::kApart));
    return part;
  }

 private:
  float* out_;
  float2* weights_;
};

// What counts the blocks of a tile that have ended.
__device__ __forceinline__ uint32_t* ticket_of(const DecodeParams& params, const Tile& tile) {
  return params.tickets + params.cache.batch + tile.index;
}

// Where the `count` blocks that share a tile meet: `place_of(p)` is where the part of the p-th
// lies, of which this is number `mine`.
template <typename Traits, typename PlaceOf>
class SharedTile {
  using T = typename Traits::T;
  using Factors = typename Traits::Factors;
  using Part = typename GlobalParts<Traits>::Part;

 public:
  __device__ SharedTile(const DecodeParams& params, const Tile& tile, int mine, int count,
                        PlaceOf place_of)
      : params_(params),
        tile_(tile),
        parts_(params),
        mine_(mine),
        count_(count),
        place_of_(place_of) {}

  // A team merges what the warps of its block have found: `found(w)`. That is the result if there
  // are no other blocks.
  template <typename Team, typename OfWarp>
  __device__ __forceinline__ void merge_warps(Team team, const Factors& factors,
                                              OfWarp found) const {
    for_parts(team, [&](int row, int column) {
      const Part part = of_warps(row, column, found);
      if (count_ == 1) {
        store_result<T>(params_, tile_, row, column, part, factors.out);
      } else {
        parts_.store(place_of_(mine_), row, column, part);
      }
    });
  }

  // Merges what all blocks have found, and have stored: that is the result.
  template <typename Team>
  __device__ __forceinline__ void merge_parts(Team team, const Factors& factors) const {
    merge_parts(team, factors, [](int, int) { return Part{}; }, false);
  }

  // Merges what the warps of this block have found, and in the last block what all have. Whether
  // this is the last is known (`is_last`: the others have stored their parts, which this block
  // sees), or else counted.
  template <typename Team, typename OfWarp>
  __device__ __forceinline__ void merge_block(Team team, bool is_last, const Factors& factors,
                                              OfWarp found) const {
    uint32_t* const ticket = ticket_of(params_, tile_);
    const bool keeps = count_ > 1 && is_last;
    if (!keeps) {
      merge_warps(team, factors, found);
      if (count_ == 1 || !decode::is_last(team, ticket, count_)) return;
    }
    const auto own = [&](int row, int column) { return of_warps(row, column, found); };
    merge_parts(team, factors, own, keeps);
    if (keeps && team.index() == 0) take_ticket(ticket, count_);
  }

 private:
  // If `keeps`, this block's part is not stored, but found again.
  template <typename Team, typename Own>
  __device__ __forceinline__ void merge_parts(Team team, const Factors& factors, Own own,
                                              bool keeps) const {
    for_parts(team, [&](int row, int column) {
      Part part;
      if (keeps) part = own(row, column);
      const auto read = [&](int p) {
        return keeps && p == mine_ ? part : parts_.load(place_of_(p), row, column);
      };
      constexpr int kMany = Traits::kPartsAtOnce, kFew = kMany < 4 ? kMany : 4;
      store_result<T>(
          params_, tile_, row, column,
          kMany <= kFew || count_ <= kFew ? merge<kFew>(count_, read) : merge<kMany>(count_, read),
          factors.out);
    });
  }

  template <typename Team, typename F>
  __device__ __forceinline__ void for_parts(Team team, F f) const {
    decode::for_parts<Part>(tile_, team, f);
  }

  template <typename OfWarp>
  __device__ __forceinline__ Part of_warps(int row, int column, OfWarp found) const {
    return merge<Traits::kWarps>(Traits::kWarps,
                                 [&](int w) { return part_of<Part>(found(w), row, column); });
  }

  const DecodeParams& params_;
  const Tile& tile_;
  const GlobalParts<Traits> parts_;
  const int mine_, count_;
  const PlaceOf place_of_;
};

// Merges what the warps of a block have found, and then, in the last block of the tile, what its
// `splits` blocks have.
template <typename Traits, typename OfWarp>
__device__ __forceinline__ void merge_splits(const DecodeParams& params, const Tile& tile,
                                             const typename Traits::Factors& factors, int split,
                                             int splits, OfWarp found) {
  const int64_t first = (tile.index - params.whole_tiles) * splits;
  const auto place_of = [first](int p) { return first + p; };
  SharedTile<Traits, decltype(place_of)>(params, tile, split, splits, place_of)
      .merge_block(BlockTeam<Traits::kThreads>(), false, factors, found);
}

}  // namespace longgen::decode
