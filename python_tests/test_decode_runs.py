"""How blocks of the Hopper persistent decode kernel share out all tiles, compiled for the CPU."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
from host_library import NVCC, address, compile_for_host
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which compiles csrc for the CPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("decode_runs.cu", tmp_path_factory.mktemp("runs"))


def wrong(library: ctypes.CDLL, pairs: list[int], places: list[int], blocks: int) -> int:
    arrays = [np.array(x, dtype=np.int32) for x in (pairs, places)]
    return library.check_runs(len(pairs), *map(address, arrays), blocks)


@pytest.mark.parametrize("blocks", [1, 3, 108, 132])
@pytest.mark.parametrize(
    ("tiles", "pairs"), [(1, 0), (1, 1), (1, 5000), (8, 4096), (64, 288), (132, 64), (160, 288), (320, 7), (1000, 0)]
)
def test_every_pair_is_read_once(tiles: int, pairs: int, blocks: int, library: ctypes.CDLL) -> None:
    assert wrong(library, [pairs] * tiles, [pairs] * tiles, blocks) == 0


@given(
    sequences=st.lists(st.tuples(st.integers(0, 300), st.integers(-3, 3)), min_size=1, max_size=12),
    heads=st.integers(1, 5),
    blocks=st.integers(1, 140),
)
def test_sequences_of_any_length(
    sequences: list[tuple[int, int]], heads: int, blocks: int, library: ctypes.CDLL
) -> None:
    """All heads have the places of the first one; another may have more or fewer pairs."""
    pairs = [max(n + (more if head > 0 else 0), 0) for n, more in sequences for head in range(heads)]
    places = [n for n, _ in sequences for _ in range(heads)]
    assert wrong(library, pairs, places, blocks) == 0


@given(
    tiles=st.integers(1, 500),
    pairs=st.integers(0, 300) | st.integers(0, 5000),
    more=st.lists(st.integers(-3, 3), min_size=1, max_size=5),
    blocks=st.integers(1, 140),
    octets=st.sampled_from([1, 2]),
)
@example(tiles=96, pairs=128, more=[0], blocks=132, octets=1)
@example(tiles=136, pairs=64, more=[0], blocks=132, octets=2)
@example(tiles=28, pairs=288, more=[0], blocks=132, octets=1)
def test_equal_tiles(tiles: int, pairs: int, more: list[int], blocks: int, octets: int, library: ctypes.CDLL) -> None:
    """Each pair is read once, and each part has a place of its own."""
    array = np.array([max(pairs + (more[t % len(more)] if t > 0 else 0), 0) for t in range(tiles)], dtype=np.int32)
    longest = ctypes.c_int()
    assert library.check_equal_tiles(tiles, address(array), blocks, octets, ctypes.byref(longest)) == 0


@pytest.mark.parametrize(
    ("tiles", "pairs", "more"),
    [
        (96, 128, 0.07),
        (70, 288, 0.02),
        (112, 288, 0.06),
        (160, 64, 0.02),
        (136, 64, 0.05),
        (133, 64, 0.1),
        (264, 64, 0),
    ],
)
def test_equal_tiles_are_shared_out_evenly(tiles: int, pairs: int, more: float, library: ctypes.CDLL) -> None:
    """By how much the block of 132 that has the most to read has more than on average."""
    longest = ctypes.c_int()
    array = np.full(tiles, pairs, dtype=np.int32)
    assert library.check_equal_tiles(tiles, address(array), 132, 1, ctypes.byref(longest)) == 0
    assert longest.value <= math.ceil(tiles * pairs / 132 * (1 + more))


@pytest.mark.parametrize(("places", "blocks"), [(1, 1), (7, 132), (132, 132), (33024, 132), (32904, 132), (1001, 108)])
def test_no_run_is_longer_than_another_by_more_than_one(places: int, blocks: int, library: ctypes.CDLL) -> None:
    longest, shortest = ctypes.c_int(), ctypes.c_int()
    library.runs(places, blocks, ctypes.byref(longest), ctypes.byref(shortest))
    assert longest.value - shortest.value == (0 if places % blocks == 0 else 1)
    assert longest.value == -(-places // blocks)
