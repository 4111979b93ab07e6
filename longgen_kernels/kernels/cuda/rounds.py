"""What the decode kernel does with more tiles than small thread blocks run at once: two rounds, of which the last tiles
are split so that no multiprocessor is idle for long in the end.

How they are split depends on sizes alone, so that a result has the same bits on any GPU of as many multiprocessors.
What is known of its halves decides only which multiprocessors do it.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

__all__ = ["Halves", "LastTiles", "last_tiles"]


class Halves(Enum):
    """What the halves of a GPU must be for each to do as much: anything, even unknown; known; different in how many
    fast multiprocessors they have.

    Where a half has more of those, its first blocks end before those of the other half, which then takes most of what
    is left and ends late: up to 10% more time. Where the halves are alike, dealing by halves costs a microsecond or
    two, which what is long makes up for.
    """

    ANY = 0
    KNOWN = 1
    DIFFERENT = 2

    def are(self, differ: bool | None) -> bool:
        """Whether they are so, if they `differ`; None: it is not known."""
        return self is Halves.ANY or (differ is not None and (differ or self is Halves.KNOWN))


class _Rule(NamedTuple):
    """For up to a part of a round that is left over: into how many pieces each of the last tiles is split."""

    up_to: float
    pieces: int = 1
    is_full: bool = False  # so many tiles that the second round is full; or else as many pieces as run at once
    are_big: bool = False  # big blocks have all, and as many pieces of the last round as it needs to be full
    halves: Halves | None = None  # on which GPUs each half does half of the blocks


def _dealt(up_to: float, pieces: int) -> _Rule:
    return _Rule(up_to, pieces, halves=Halves.DIFFERENT)


def _full(up_to: float, pieces: int, halves: Halves | None = None) -> _Rule:
    return _Rule(up_to, pieces, is_full=True, halves=halves)


def _big(up_to: float) -> _Rule:
    return _Rule(up_to, are_big=True)


_MOST_BIG_PIECES = 8  # of a tile
_LONG, _VERY_LONG = 1536 << 10, 2 << 20  # keys and values of a tile, in bytes

# Measured on H200 with halves alike, and on one with halves that differ. Pieces of 16 rows cost more than those of 8,
# of which each has half as much to write for others.
_LITTLE_OF_8 = (_Rule(0.06, 2), _Rule(0.13, 8), _Rule(0.25, 4))
_LITTLE_OF_16 = (_Rule(0.06, 2), _Rule(0.12, 8), _Rule(0.25, 4))
_LITTLE_LONG_OF_16 = (_Rule(0.06, 2), _big(0.25))
# Not dealt from half a round on: of two full rounds in each half the few whole tiles of the second would be late.
_SOME = (_dealt(0.5, 2), _full(0.6, 2))
_MUCH_LONG_OF_16 = (_big(0.66), _full(0.68, 4))
_BY_HALVES = (_full(0.79, 3, Halves.KNOWN), _full(0.89, 2, Halves.KNOWN))
_WHOLE = _dealt(1.0, 1)  # the second round is nearly full
_OF_8 = (*_LITTLE_OF_8, *_SOME, _dealt(0.72, 4), _full(0.86, 2, Halves.DIFFERENT), _WHOLE)
_MUCH_OF_16 = (_full(0.77, 3, Halves.DIFFERENT), _full(0.9, 2, Halves.DIFFERENT), _WHOLE)
_RULES = {  # by whether a tile has more than 8 rows, and how long it is: below _LONG, below _VERY_LONG, or longer
    (False, 0): _OF_8,
    (False, 1): _OF_8,
    (False, 2): (*_LITTLE_OF_8, *_SOME, _dealt(0.71, 4), *_BY_HALVES, _WHOLE),
    (True, 0): (*_LITTLE_OF_16, *_SOME, _dealt(0.68, 4), *_MUCH_OF_16),
    (True, 1): (*_LITTLE_LONG_OF_16, *_SOME, *_MUCH_LONG_OF_16, *_MUCH_OF_16),
    (True, 2): (*_LITTLE_LONG_OF_16, *_SOME, *_MUCH_LONG_OF_16, _full(0.71, 3, Halves.DIFFERENT), *_BY_HALVES, _WHOLE),
}
_AFTER_TWO_ROUNDS = _Rule(math.inf)  # blocks begin at all times


class LastTiles(NamedTuple):
    """How many of the tiles are split, into how many pieces, by which blocks."""

    split: int
    pieces: int
    are_small: bool
    halves: Halves | None  # on which GPUs each half does half of the blocks


def last_tiles(tiles: int, rows: int, nbytes: int, multiprocessors: int) -> LastTiles:
    """For `tiles` of `rows` query rows and `nbytes` keys and values, more than two for each multiprocessor."""
    at_once = 2 * multiprocessors
    length = (nbytes >= _LONG) + (nbytes >= _VERY_LONG)
    rule = next((r for r in _RULES[rows > 8, length] if tiles <= (1 + r.up_to) * at_once), _AFTER_TWO_ROUNDS)
    if rule.are_big:
        left_over = tiles % multiprocessors
        pieces = 1 if left_over == 0 else min(max(1, multiprocessors // left_over), _MOST_BIG_PIECES)
        return LastTiles(0 if pieces == 1 else left_over, pieces, are_small=False, halves=None)
    if rule.pieces == 1:
        return LastTiles(0, 1, are_small=True, halves=rule.halves)
    split = (2 * at_once - tiles) // (rule.pieces - 1) if rule.is_full else at_once // rule.pieces
    return LastTiles(split, rule.pieces, are_small=True, halves=rule.halves)
