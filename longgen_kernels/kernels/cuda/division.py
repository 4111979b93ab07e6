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

__all__ = ["Division", "division_of"]

_MAX_SPLITS = 128
_CHUNKS_A_SPLIT = 4  # of 16 slots, at least: a split of a few chunks is not worth its part in the merge
_MAX_CLUSTER = 8  # thread blocks
_CLUSTERED_BYTES = 768 << 10  # of keys and values that a block of a cluster reads, at most
_SMALL_HEAD_DIM = 128  # of small thread blocks, at most; a multiprocessor holds two
_SMALL_ROUNDS = 2  # of the small blocks that run at once, at most
_LATE_BYTES = 2 << 20  # of keys and values that a small block reads, at least, if it is not to start early
_MAX_SEQUENCES = 32  # that persistent blocks share out
_MAX_SLOTS = 16 << 30  # of all KV heads and row tiles, likewise: they count pairs of chunks in 32 bits
# Of keys and values that a persistent block reads, at least, where sequences may be ragged; that a tile has, at least,
# where there are more tiles than multiprocessors.
_RAGGED_BYTES, _LONG_BYTES = 2 << 20, 8 << 20
_LEAST_IDLE = 10  # multiprocessors: of fewer it does not matter which
# What a multiprocessor could read while blocks begin and merge, fitted to what was measured on an H200: blocks without
# splits, splits that all run at once, others; persistent blocks, for tiles of up to 8 rows and of more; to take seats.
_WHOLE_COST, _ROUND_COST, _ROUNDS_COST = 84 << 10, 144 << 10, 304 << 10
_PERSISTENT_COST, _PERSISTENT_COST_OF_16 = 200 << 10, 240 << 10
_SEATS_COST = 20 << 10
# How much longer than on average the slowest reads, of blocks that have equal shares but are not persistent; where a
# sixth of the multiprocessors and more stay idle. The share of its time that a multiprocessor needs for what it reads
# where others are idle, if it does not matter which, or those that do are chosen.
_SLOWEST, _SLOWEST_OF_FEW = 1.005, 1.045
_ALONE, _CHOSEN_ALONE = 0.945, 0.62


class Division(NamedTuple):
    """What thread blocks there are; the last four on Hopper alone."""

    splits: int  # of a sequence
    clustered: bool = False  # whether they are a cluster
    small_blocks: bool = False  # whether a multiprocessor holds two
    starts_early: bool = True  # whether blocks may take their places before the kernels ahead have ended
    persistent_blocks: int = 0  # that share out all work evenly; 0: each has one split
    seats: int = 0  # multiprocessors, of which those with the first numbers stay idle; 0: whichever do

    def parts(self, blocks: int) -> int:
        """How many results of parts of sequences meet in global memory."""
        if self.persistent_blocks > 0:
            return 2 * self.persistent_blocks
        return blocks * self.splits if self.splits > 1 and not self.clustered else 0


def division_of(cache: CacheTensors, blocks: int, rows: int, multiprocessors: int, bulk: bool) -> Division:
    """The division for `blocks` tiles of `rows` query rows, each with a sequence's keys of one KV head.

    `bulk`: Hopper's own kernel, of which a block fills a multiprocessor, but for small ones. Where there are more tiles
    than multiprocessors and small blocks share out the work evenly without splits, in a round or two, they read while
    others begin or end; if all of them run at once and for long, places that the kernel ahead frees one by one suit
    them less than all together, by what was measured. A cluster merges its splits sooner than blocks that meet in
    global memory, but clusters do not fit on all multiprocessors: on half of them they do, which is enough to read what
    is short. Persistent blocks even out what splits would not, and sequences of different lengths, and leave memory
    idle the least where there is much to read, but they take longer to begin and to merge. What is long is theirs in
    any case if sequences, by what is known, may differ much in length.
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
    at_once = 2 * multiprocessors  # small blocks
    can_be_small = cache.head_dim <= _SMALL_HEAD_DIM and not cache.is_fp8
    few_rounds = multiprocessors < blocks <= _SMALL_ROUNDS * at_once
    if can_be_small and few_rounds and num_splits(blocks, most, at_once) == 1:
        return Division(1, small_blocks=True, starts_early=blocks > at_once or nbytes < _LATE_BYTES)
    cluster = min(_MAX_CLUSTER, multiprocessors // 2 // blocks, most)
    if cluster > 1 and nbytes <= cluster * _CLUSTERED_BYTES:
        return Division(cluster, clustered=True)
    splits, seated, cost = _cheapest_splits(blocks, nbytes, most, multiprocessors)
    if persistent and each + (_PERSISTENT_COST if rows <= 8 else _PERSISTENT_COST_OF_16) < cost:
        return persistent
    return Division(splits, seats=multiprocessors if seated else 0)


def _can_be_persistent(cache: CacheTensors, blocks: int) -> bool:
    """Whether the kernel counts that far, and it is known how much there is to read: of plain tensors a sparse pattern
    may show anything."""
    shows_slots = cache.layout.ring is not None or cache.layout.pattern.is_dense
    return shows_slots and 0 < cache.batch <= _MAX_SEQUENCES and blocks * cache.slots <= _MAX_SLOTS


def _may_be_ragged(cache: CacheTensors) -> bool:
    """Whether some sequences may have much more to read than others."""
    return cache.layout.pattern.is_dense and cache.batch > 1 and not cache.equal_lengths


@lru_cache(maxsize=4096)
def _cheapest_splits(blocks: int, nbytes: int, most: int, multiprocessors: int) -> tuple[int, bool, float]:
    """The number of splits that takes the least time, whether they take seats, and how much one of the multiprocessors
    could read in it."""
    each = blocks * nbytes / multiprocessors

    def cost(splits: int, seated: bool) -> float:
        own, rounds = nbytes / splits, math.ceil(blocks * splits / multiprocessors)
        beginning = _WHOLE_COST if splits == 1 else _ROUND_COST if rounds == 1 else _ROUNDS_COST
        if not seated:
            return _SLOWEST * max(each, _ALONE * rounds * own) + beginning
        slowest = _SLOWEST_OF_FEW if 6 * blocks * splits <= 5 * multiprocessors else _SLOWEST
        return max(slowest * each, _CHOSEN_ALONE * own) + beginning + _SEATS_COST

    def ways() -> Iterator[tuple[int, bool]]:
        for splits in range(1, max(1, most) + 1):
            yield splits, False
            if blocks * splits <= multiprocessors - _LEAST_IDLE and multiprocessors < SEAT_COUNTS:
                yield splits, True

    best = min(ways(), key=lambda way: cost(*way))
    return *best, cost(*best)
