"""How the decode kernels' work is divided among thread blocks.

It depends on sizes alone, not on lengths: a CUDA graph is replayed while the cache grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from longgen_kernels.cache_layout import GRANULE
from longgen_kernels.kernels.cache_problem import SEAT_COUNTS, CacheTensors, max_tiles, num_splits
from longgen_kernels.kernels.cuda.rounds import Halves, last_tiles

__all__ = ["Division", "division_of"]

_MAX_SPLITS = 128
_CHUNKS_A_SPLIT = 4  # of 16 slots, at least: a split of a few chunks is not worth its part in the merge
_MAX_CLUSTER = 8  # thread blocks
_CLUSTERED_BYTES = 768 << 10  # of keys and values that a block of a cluster reads, at most
_SMALL_HEAD_DIM = 128  # of small thread blocks, at most; a multiprocessor holds two
_LEAST_SMALL = 1.45  # tiles for each multiprocessor: fewer are not read evenly by small blocks
_LATE_BYTES = 2 << 20  # of keys and values that a small block reads, at least, if it is not to start early
_MAX_SEQUENCES = 32  # that persistent blocks share out
_MAX_SLOTS = 16 << 30  # of all KV heads and row tiles, likewise: they count pairs of chunks in 32 bits
# Of keys and values that a persistent block reads, at least, where sequences may be ragged; that a tile has, at least,
# where there are more tiles than multiprocessors.
_RAGGED_BYTES, _LONG_BYTES = 2 << 20, 8 << 20
_LEAST_IDLE, _LEAST_IDLE_OF_SMALL = 8, 16  # multiprocessors, or their halves: of fewer it matters little which
# What follows was fitted to measurements on an H200, where it is said how much a multiprocessor could read in some time
# if all were reading.
#
# While blocks begin and merge: a cluster, on half of the multiprocessors or, of two, on more; blocks without splits,
# splits that all run at once, others, those of fp8 caches, and each split more than 16; who takes a seat. Persistent
# blocks, for tiles of up to 8 rows, of more, and of fp8 caches, and each part of a tile more than 8.
_CLUSTER_COST, _PAIRS_COST = 100 << 10, 92 << 10
_WHOLE_COST, _ROUND_COST, _ROUNDS_COST, _ROUNDS_COST_OF_FP8 = 84 << 10, 144 << 10, 304 << 10, 500 << 10
_MANY_SPLITS, _SPLIT_COST = 16, 1792
_SEATS_COST = 23 << 10
_PERSISTENT_COST, _PERSISTENT_COST_OF_16, _PERSISTENT_COST_OF_FP8 = 200 << 10, 240 << 10, 330 << 10
_MANY_PARTS, _PART_COST = 8, 5632
# Persistent blocks of fp8 caches: how much longer they read, and each tile more than three quarters of the
# multiprocessors, if there are not more tiles than these.
_SLOWER_OF_FP8, _TILE_COST_OF_FP8 = 1.06, 30 << 10
# While blocks read that are neither persistent nor have seats: how much longer than on average the slowest does; where
# whole tiles do not all run at once, how much of one the last ends later than on average, and the least for all.
_SLOWEST, _LATER, _LEAST_ROUNDS = 1.005, 0.25, 1.5
# The same with seats, if a third of the multiprocessors and more stay idle.
_FEW_SEATED = 1.006
# What share of that a multiprocessor needs where others are idle: nearly half of them, one of each pair, for up to 8
# rows, for more; those without seats; whichever; blocks of fp8 caches that do not all run at once. In a cluster of two,
# or few clusters; in others, which are not spread evenly over the GPU; in clusters of two on more than half of it.
_HALF_ALONE, _HALF_ALONE_OF_16, _SEATED_ALONE, _ALONE, _ALONE_OF_FP8 = 0.505, 0.525, 0.55, 0.945, 1.06
_PAIR_ALONE, _CLUSTER_ALONE, _PAIRS_ALONE = 0.49, 0.75, 0.983


class Division(NamedTuple):
    """What thread blocks there are; all but the splits on Hopper alone."""

    splits: int  # of a tile
    whole_tiles: int = 0  # the first so many have one split all the same
    clustered: bool = False  # whether they are a cluster
    small_blocks: bool = False  # whether a multiprocessor holds two
    starts_early: bool = True  # whether blocks may take their places before the kernels ahead have ended
    persistent_blocks: int = 0  # that share out all work evenly; 0: each has one split
    seats: int = 0  # multiprocessors, of which the GPU's halves have as much to do; 0: whichever do what there is
    halves: Halves = Halves.ANY  # on which GPUs that is so

    def items(self, tiles: int) -> int:
        """How many splits all tiles have."""
        return self.whole_tiles + (tiles - self.whole_tiles) * self.splits

    def parts(self, tiles: int) -> int:
        """How many results of parts of tiles meet in global memory."""
        if self.persistent_blocks > 0:
            return 2 * self.persistent_blocks
        return (tiles - self.whole_tiles) * self.splits if self.splits > 1 and not self.clustered else 0


def division_of(cache: CacheTensors, blocks: int, rows: int, multiprocessors: int, bulk: bool) -> Division:
    """The division for `blocks` tiles of `rows` query rows, each with a sequence's keys of one KV head.

    `bulk`: Hopper's own kernel, of which a block fills a multiprocessor, but for small ones. Persistent blocks have
    what is long if sequences, by what is known, may differ much in length, small blocks what is many tiles. Otherwise
    what takes the least time:

    - A cluster merges its splits sooner than blocks that meet in global memory, but only clusters of two fit on all
      multiprocessors: others do on half of them, and on some parts of the GPU more than on others. With 16 rows, on
      more than half of the multiprocessors, they are no faster.
    - Splits, or whole tiles. Where some multiprocessors stay idle, blocks take seats, so that both halves of the GPU
      have as many; not blocks of fp8 caches, which are not read that fast.
    - Persistent blocks even out what splits would not, but take longer to begin and to merge.
    """
    most = min(_MAX_SPLITS, max_tiles(cache, GRANULE * _CHUNKS_A_SPLIT))
    if not bulk:
        return Division(num_splits(blocks, most, multiprocessors))
    nbytes = 2 * cache.slots * cache.head_dim * cache.k.element_size()  # that a block without splits reads
    each = blocks * nbytes // multiprocessors
    persistent = Division(1, persistent_blocks=multiprocessors) if _can_be_persistent(cache, blocks) else None
    is_long = each >= _RAGGED_BYTES and (blocks <= multiprocessors or nbytes >= _LONG_BYTES)
    if persistent and is_long and _may_be_ragged(cache):
        return persistent
    if cache.head_dim <= _SMALL_HEAD_DIM and not cache.is_fp8:
        small = _small_blocks(blocks, rows, nbytes, multiprocessors)
        if small is not None:
            return small
    best, cost = _cheapest(blocks, rows, nbytes, most, multiprocessors, cache.is_fp8)
    return persistent if persistent and _persistent_cost(cache, blocks, rows, each, multiprocessors) < cost else best


def _small_blocks(tiles: int, rows: int, nbytes: int, multiprocessors: int) -> Division | None:
    """For so many tiles of `nbytes`; None: there are too few of them.

    A small block reads while the other one of its multiprocessor begins or ends. If all run at once and for long,
    places that the kernel ahead frees one by one suit them less than all together, by what was measured; with seats
    they begin early all the same.
    """
    at_once = 2 * multiprocessors
    if tiles < _LEAST_SMALL * multiprocessors:
        return None
    if tiles > at_once:
        last = last_tiles(tiles, rows, nbytes, multiprocessors)
        whole = tiles - last.split if last.split > 0 else 0
        division = Division(last.pieces, whole_tiles=whole, small_blocks=last.are_small)
        if last.halves is None or multiprocessors >= SEAT_COUNTS:
            return division
        return division._replace(seats=multiprocessors, halves=last.halves)
    have_seats = at_once - tiles >= _LEAST_IDLE_OF_SMALL and multiprocessors < SEAT_COUNTS
    seats = multiprocessors if have_seats else 0
    return Division(1, small_blocks=True, seats=seats, starts_early=have_seats or nbytes < _LATE_BYTES)


def _persistent_cost(cache: CacheTensors, tiles: int, rows: int, each: float, multiprocessors: int) -> float:
    """What one of the multiprocessors could read in the time that persistent blocks take."""
    parts = max(0, multiprocessors // tiles - _MANY_PARTS) * _PART_COST
    if not cache.is_fp8:
        return each + (_PERSISTENT_COST if rows <= 8 else _PERSISTENT_COST_OF_16) + parts
    many = tiles - 3 * multiprocessors // 4 if tiles < multiprocessors else 0
    return _SLOWER_OF_FP8 * each + _PERSISTENT_COST_OF_FP8 + parts + max(0, many) * _TILE_COST_OF_FP8


def _can_be_persistent(cache: CacheTensors, blocks: int) -> bool:
    """Whether the kernel counts that far, and it is known how much there is to read: of plain tensors a sparse pattern
    may show anything."""
    shows_slots = cache.layout.ring is not None or cache.layout.pattern.is_dense
    return shows_slots and 0 < cache.batch <= _MAX_SEQUENCES and blocks * cache.slots <= _MAX_SLOTS


def _may_be_ragged(cache: CacheTensors) -> bool:
    """Whether some sequences may have much more to read than others."""
    return cache.layout.pattern.is_dense and cache.batch > 1 and not cache.equal_lengths


@lru_cache(maxsize=4096)
def _cheapest(
    blocks: int, rows: int, nbytes: int, most: int, multiprocessors: int, is_fp8: bool
) -> tuple[Division, float]:
    """Of clusters and splits what takes the least time, and how much one of the multiprocessors could read in it."""
    each = blocks * nbytes / multiprocessors

    def cost(way: Division) -> float:
        count, own = blocks * way.splits, nbytes / way.splits
        if way.clustered and 2 * count > multiprocessors:
            return max(each, _PAIRS_ALONE * own) + _PAIRS_COST
        if way.clustered:
            are_spread = way.splits == 2 or 4 * count <= multiprocessors
            alone = 1.0 if is_fp8 else _PAIR_ALONE if are_spread else _CLUSTER_ALONE
            return alone * own + _CLUSTER_COST
        rounds = math.ceil(count / multiprocessors)
        of_rounds = _ROUNDS_COST_OF_FP8 if is_fp8 else _ROUNDS_COST
        beginning = _WHOLE_COST if way.splits == 1 else _ROUND_COST if rounds == 1 else of_rounds
        beginning += max(0, way.splits - _MANY_SPLITS) * _SPLIT_COST
        if way.seats > 0:
            slower = _FEW_SEATED if 3 * count < 2 * multiprocessors else 1
            return max(slower * each, _SEATED_ALONE * own) + beginning + _SEATS_COST
        if rounds > 1 and way.splits == 1 and not is_fp8:
            return max(each + _LATER * own, _LEAST_ROUNDS * own) + beginning
        are_half = 2 * count <= multiprocessors - 2 and not is_fp8
        of_half = _HALF_ALONE if rows <= 8 else _HALF_ALONE_OF_16
        alone = of_half if are_half else _ALONE_OF_FP8 if is_fp8 and rounds > 1 else _ALONE
        return _SLOWEST * max(each, alone * rounds * own) + beginning

    def ways() -> Iterator[Division]:
        cluster = min(_MAX_CLUSTER, multiprocessors // 2 // blocks, most)
        if cluster > 1 and nbytes <= cluster * _CLUSTERED_BYTES:
            yield Division(cluster, clustered=True)
        if multiprocessors < 4 * blocks <= 2 * multiprocessors and most > 1 and rows <= 8 and not is_fp8:
            yield Division(2, clustered=True)
        for splits in range(1, max(1, most) + 1):
            yield Division(splits)
            if blocks * splits <= multiprocessors - _LEAST_IDLE and multiprocessors < SEAT_COUNTS and not is_fp8:
                yield Division(splits, seats=multiprocessors)

    best = min(ways(), key=cost)
    return best, cost(best)
