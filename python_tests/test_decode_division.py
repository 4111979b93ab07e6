"""How the decode kernel's work is divided: which way for which sizes."""

from __future__ import annotations

import pytest
import torch
from cache_model import PATTERNS
from hypothesis import given
from hypothesis import strategies as st

from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.kernels.cache_problem import CacheTensors
from longgen_kernels.kernels.cuda.division import Division, division_of
from longgen_kernels.kernels.cuda.rounds import Halves


def cache_of(
    kv_heads: int, slots: int, batch: int = 1, kind: str = "causal", equal_lengths: bool = False
) -> CacheTensors:
    k = torch.empty(batch, kv_heads, slots, 128, dtype=torch.bfloat16, device="meta")
    lengths = torch.zeros(batch, dtype=torch.int32, device="meta")
    return CacheTensors(k, k, lengths, CacheLayout.compact(PATTERNS[kind]), equal_lengths=equal_lengths)


def divided(cache: CacheTensors, rows: int = 8, bulk: bool = True) -> Division:
    """On a GPU of 132 multiprocessors."""
    return division_of(cache, cache.batch * cache.kv_heads, rows, 132, bulk)


CLUSTER_OF_2, CLUSTER_OF_8 = (Division(splits, clustered=True) for splits in (2, 8))
SMALL, SMALL_AND_LATE = (Division(1, small_blocks=True, starts_early=early) for early in (True, False))
PERSISTENT = Division(1, persistent_blocks=132)
SEATED, SEATED_2, SEATED_3, SEATED_4 = (Division(splits, seats=132) for splits in (1, 2, 3, 4))
SEATED_SMALL = Division(1, small_blocks=True, seats=132)


def dealt(pieces: int = 1, whole: int = 0, halves: Halves = Halves.DIFFERENT) -> Division:
    """Small blocks; the tiles after so many in pieces; where halves are so, each does half of it."""
    return Division(pieces, whole_tiles=whole, small_blocks=True, seats=132, halves=halves)


@pytest.mark.parametrize(
    ("kv_heads", "slots", "want"),
    [
        (8, 2064, CLUSTER_OF_8),
        (32, 2064, CLUSTER_OF_2),
        (16, 2064, Division(8)),  # clusters of four would be uneven
        (8, 9232, Division(16)),
        (1, 2064, CLUSTER_OF_8),
        (1, 32784, Division(65)),  # on half of the multiprocessors, one of each pair
        (32, 9232, Division(4)),
        (8, 131072, Division(16)),
        (64, 64, Division(1)),
        (132, 9232, Division(1)),
        (184, 2064, PERSISTENT),  # small blocks would fill less than 3/4 of their places
        (198, 2064, SEATED_SMALL),
        (198, 9232, SEATED_SMALL),
        (160, 9232, PERSISTENT),
        (100, 9232, SEATED),
        (100, 2064, SEATED),  # for less than it takes them to begin and to merge
        (120, 2064, SEATED),
        (124, 2064, Division(1)),  # which eight multiprocessors are idle matters little
        (40, 9232, SEATED_3),
        (40, 2064, Division(3)),  # what is short does not wait for seats
        (28, 9232, SEATED_4),
        (36, 9232, SEATED_3),
        (64, 9232, CLUSTER_OF_2),  # on all pairs of multiprocessors
        (60, 9232, SEATED_2),
        (64, 1040, CLUSTER_OF_2),
        (132, 32768, Division(1)),
        (32, 131072, SEATED_3),
        (256, 2064, SMALL),
        (264, 9232, SMALL_AND_LATE),
        (512, 9232, dealt()),  # the second round is nearly full
        (384, 9232, dealt(2, whole=252)),
        (1024, 2064, SMALL),
        (288, 2064, Division(8, whole_tiles=255, small_blocks=True)),  # the last 33 in 264 pieces
        (416, 4112, Division(2, whole_tiles=304, small_blocks=True)),  # 264, then 40 and 112 in 224 pieces
        (448, 2064, dealt(4, whole=382)),
        (496, 2064, dealt()),
        (576, 2064, SMALL),  # after two blocks begin at all times
        (8, 139264, Division(16)),
    ],
)
def test_how_work_is_divided(kv_heads: int, slots: int, want: Division) -> None:
    """Clusters on half of the multiprocessors, blocks on nearly all, seats where some stay idle, small blocks for many
    tiles, and persistent ones for what is long or does not come out even."""
    assert divided(cache_of(kv_heads, slots)) == want
    division = divided(cache_of(kv_heads, slots), bulk=False)
    assert division == Division(division.splits)


@pytest.mark.parametrize(
    ("kind", "batch", "kv_heads", "slots", "want"),
    [
        ("causal", 8, 8, 131072, PERSISTENT),
        ("causal", 8, 8, 9232, PERSISTENT),
        ("strided blocks", 8, 8, 9232, CLUSTER_OF_2),  # sequences of whatever length keep about as much
        ("causal", 8, 8, 2064, CLUSTER_OF_2),
        ("causal", 8, 32, 9232, SMALL_AND_LATE),
        ("causal", 8, 32, 32768, PERSISTENT),
        ("causal", 32, 32, 131072, PERSISTENT),
        ("causal", 33, 32, 131072, SMALL),  # a lane of a warp knows the length of one sequence
    ],
)
def test_how_sequences_that_may_differ_in_length_are_divided(
    kind: str, batch: int, kv_heads: int, slots: int, want: Division
) -> None:
    assert divided(cache_of(kv_heads, slots, batch, kind)) == want


@pytest.mark.parametrize(
    ("rows", "batch", "kv_heads", "slots", "want"),
    [
        (8, 8, 8, 131072, PERSISTENT),
        (8, 8, 8, 32768, Division(2)),
        (8, 8, 32, 32768, SMALL_AND_LATE),
        (8, 4, 32, 32768, Division(1)),
        (16, 8, 8, 131072, PERSISTENT),
        (16, 8, 8, 32768, Division(2)),
        (16, 8, 8, 2064, Division(1)),  # on one of each pair of multiprocessors
        (16, 8, 1, 131072, Division(16)),
        (16, 5, 8, 32768, SEATED_3),
        (8, 12, 8, 4112, SEATED),
        (8, 9, 8, 4112, SEATED),
        (8, 9, 8, 9232, SEATED),
        (16, 1, 48, 2064, SEATED_2),  # persistent blocks need longer for more rows
        (16, 36, 8, 2064, Division(8, whole_tiles=255, small_blocks=True)),
        (16, 48, 8, 2064, dealt(2, whole=252)),
        (16, 48, 8, 4112, dealt(2, whole=252)),
        (16, 40, 8, 4112, Division(2, whole_tiles=264)),  # big blocks, whose rounds cost less if they are long
        (16, 52, 8, 2064, Division(2, whole_tiles=304, small_blocks=True)),
        (16, 52, 8, 4112, Division(2, whole_tiles=304, small_blocks=True)),
        (16, 54, 8, 2064, dealt(4, whole=366)),
        (16, 54, 8, 4112, Division(3, whole_tiles=396)),
        (16, 56, 8, 4112, dealt(3, whole=408)),  # 264, then 144 and 40 in 120 pieces
        (16, 60, 8, 2064, dealt(2, whole=432)),  # 264, then 168 and 48 in 96 pieces
        (8, 58, 8, 4112, dealt(3, whole=432, halves=Halves.KNOWN)),
        (8, 60, 8, 4112, dealt(2, whole=432, halves=Halves.KNOWN)),
        (16, 64, 8, 2064, dealt()),
    ],
)
def test_how_sequences_of_one_length_are_divided(
    rows: int, batch: int, kv_heads: int, slots: int, want: Division
) -> None:
    assert divided(cache_of(kv_heads, slots, batch, equal_lengths=True), rows) == want


@pytest.mark.parametrize(
    ("rows", "kv_heads", "slots", "halves"),
    [
        (8, 320, 2064, None),
        (8, 352, 2064, Halves.DIFFERENT),
        (8, 400, 3088, None),  # each half would have two full rounds, the second one of whole tiles and of pieces
        (8, 464, 2064, Halves.DIFFERENT),
        (8, 464, 4112, Halves.KNOWN),
        (8, 500, 4112, Halves.DIFFERENT),
        (16, 352, 3088, Halves.DIFFERENT),
        (16, 432, 2064, Halves.DIFFERENT),
        (16, 432, 3088, None),  # big blocks
        (16, 480, 3088, Halves.DIFFERENT),
        (16, 448, 4112, Halves.DIFFERENT),
        (16, 456, 4112, Halves.KNOWN),
        (16, 496, 4112, Halves.KNOWN),
        (16, 528, 4112, Halves.DIFFERENT),
        (16, 529, 4112, None),
    ],
)
def test_on_which_gpus_each_half_does_half(rows: int, kv_heads: int, slots: int, halves: Halves | None) -> None:
    division = divided(cache_of(kv_heads, slots), rows)
    assert (division.seats, division.halves) == ((0, Halves.ANY) if halves is None else (132, halves))


@pytest.mark.parametrize("differ", [None, False, True])
def test_what_halves_must_be(differ: bool | None) -> None:
    assert Halves.ANY.are(differ)
    assert Halves.KNOWN.are(differ) == (differ is not None)
    assert Halves.DIFFERENT.are(differ) == (differ is True)


@given(kv_heads=st.integers(1, 1200), slots=st.integers(1, 300), rows=st.sampled_from([8, 16]))
def test_there_are_as_many_items_as_a_kernel_takes(kv_heads: int, slots: int, rows: int) -> None:
    """Whole tiles are some of them; big blocks with seats are fewer than these. Where more than run at once are dealt
    by halves, these must be known."""
    division = divided(cache_of(kv_heads, 16 * slots, equal_lengths=True), rows)
    items, at_once = division.items(kv_heads), 264 if division.small_blocks else 132
    assert 0 <= division.whole_tiles < kv_heads
    if division.seats > 0:
        assert division.seats == 132
        assert division.small_blocks or items < 132
        assert (division.halves is Halves.ANY) == (items <= at_once)


def test_persistent_blocks_leave_plain_tensors_of_a_sparse_pattern_alone() -> None:
    cache = cache_of(8, 131072, 8, "strided blocks")
    assert divided(cache) == PERSISTENT
    plain = cache._replace(layout=CacheLayout(PATTERNS["strided blocks"]))
    assert divided(plain) == Division(2)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "slots", "want"),
    [
        (14, 8, 4112, Division(1)),  # no seats: what is read has to be converted, which takes longer
        (9, 8, 4112, PERSISTENT),
        (1, 32, 2064, Division(4)),
        (1, 8, 2064, CLUSTER_OF_8),
        (1, 5, 9232, Division(25)),
    ],
)
def test_how_fp8_caches_are_divided(batch: int, kv_heads: int, slots: int, want: Division) -> None:
    cache = cache_of(kv_heads, slots, batch, equal_lengths=True)
    k = torch.empty(cache.k.shape, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.ones(kv_heads, device="meta")
    fp8 = cache._replace(k=k, v=k, k_scale=scale, v_scale=scale, given_dtype=torch.bfloat16)
    assert divided(fp8) == want
