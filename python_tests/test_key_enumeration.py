"""The Hopper forward kernel's enumeration of keys, compiled for the CPU, against the definition of "visible"."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from attention_cases import A, patterns_of_every_kind, random_mask
from host_library import NVCC, ROOT, address, code, compile_for_host
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen_kernels import AttentionPattern, BlockMask

TILE = 128
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which compiles csrc for the CPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("key_enumeration.cu", tmp_path_factory.mktemp("enumeration"))


def check(
    library: ctypes.CDLL,
    pattern: AttentionPattern | BlockMask,
    seqlen_q: int,
    seqlen_k: int,
    q_start: int,
    k_start: int,
    page_size: int = TILE,
) -> None:
    """Every visible pair is shown once, nothing else, for each head and query tile."""
    is_mask = isinstance(pattern, BlockMask)
    heads = pattern.heads if isinstance(pattern, BlockMask) else 3
    has_blocks = is_mask or pattern.stride
    box = min(TILE, page_size, pattern.block_size or TILE) if has_blocks else min(TILE, page_size)
    numbers = code(pattern)
    rows = pattern.rows.numpy() if isinstance(pattern, BlockMask) else None
    q_pos, k_pos = torch.arange(q_start, q_start + seqlen_q), torch.arange(k_start, k_start + seqlen_k)
    for head in range(heads):
        want = pattern.is_visible(q_pos[:, None], k_pos[None], head).numpy().astype(np.int32)
        for p_tile in range(q_start // TILE * TILE, q_start + seqlen_q, TILE):
            first, last = max(p_tile, q_start), min(p_tile + TILE, q_start + seqlen_q) - 1
            seen = np.zeros((TILE, seqlen_k), dtype=np.int32)
            wrong = library.enumerate(
                address(numbers), address(rows), box.bit_length() - 1, p_tile, first, last, k_start, seqlen_k,
                head, heads, address(seen),
            )  # fmt: skip
            assert wrong == 0
            got = seen[first - p_tile : last - p_tile + 1]
            assert (got == want[first - q_start : last - q_start + 1]).all(), (head, p_tile)


def kernel_takes(pattern: AttentionPattern | BlockMask) -> bool:
    if isinstance(pattern, BlockMask):
        return pattern.block_size >= 64
    return not pattern.stride or (pattern.block_size or 1) >= 16


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("kind", patterns_of_every_kind(128))
def test_every_kind_of_pattern(kind: str, size: int, library: ctypes.CDLL) -> None:
    pattern = patterns_of_every_kind(size)[kind]
    if not kernel_takes(pattern):
        pytest.skip("not for this kernel")
    for shape in (  # lengths of queries and keys, then where they start
        (300, 300, 0, 0),
        (1, 200, 199, 0),
        (190, 100, 64, 100),
        (64, 64, 64, 9),
    ):
        check(library, pattern, *shape)
        check(library, pattern, *shape, page_size=16)


def test_the_documentation_draws_the_tiles_that_are_visited(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # `bench` is run from the root and is not installed
    key_tiles = pytest.importorskip("bench.diagrams.key_tiles", reason="the sources have no bench/")
    for example in key_tiles.EXAMPLES:
        per_tile = TILE // example.box
        positions, masked = np.zeros((example.tiles, per_tile), np.int32), np.zeros(example.tiles, np.int32)
        for query_tile in range(example.tiles):
            drawn = key_tiles.visits(example, query_tile)
            visited = library.list_tiles(
                address(code(example.pattern)), example.box.bit_length() - 1, query_tile * TILE, example.seqlen,
                address(positions), address(masked),
            )  # fmt: skip
            boxes = [[box.position for box in tile] for tile in drawn]
            assert [tile[: len(want)] for tile, want in zip(positions[:visited].tolist(), boxes, strict=True)] == boxes
            if query_tile == example.shown:
                assert masked[:visited].tolist() == [key_tiles.is_masked(example, tile) for tile in drawn]


@pytest.mark.parametrize(
    ("batch", "heads", "tiles"), [(1, 1, 1), (2, 3, 31), (1, 32, 128), (3, 7, 1056), (1, 2, 2500), (1, 2000, 5)]
)
def test_every_query_tile_is_one_item(batch: int, heads: int, tiles: int, library: ctypes.CDLL) -> None:
    items = np.zeros((batch, heads, tiles), dtype=np.int32)
    library.list_work(batch, heads, tiles, address(items))
    assert (items == 1).all()


@st.composite
def patterns(draw: st.DrawFn) -> AttentionPattern | BlockMask:
    tokens = st.sampled_from([0, 1, 5, 63, 128, 200, 513])
    if draw(st.booleans()):
        blocks = draw(st.sampled_from([64, 128, 256]))
        n = -(-1000 // blocks)
        density, seed = draw(st.floats(0, 1)), draw(st.integers(0, 9999))
        return random_mask(n, n, blocks, heads=2, density=density, seed=seed, is_causal=draw(st.booleans()))
    window = {"window": draw(tokens)} if draw(st.booleans()) else {"window_blocks": draw(st.integers(0, 4))}
    return A.strided(
        draw(st.integers(1, 6)),
        2 ** draw(st.integers(4, 9)),
        sink=draw(tokens),
        head_phase_step=draw(st.integers(0, 5)),
        head_phase_offset=draw(st.integers(0, 9)),
        **window,
    )


@given(
    pattern=patterns(),
    seqlens=st.tuples(st.integers(1, 600), st.integers(1, 700)),
    starts=st.tuples(st.integers(0, 400), st.sampled_from([0, 0, 64, 131])),
    page_size=st.sampled_from([16, 32, 64, 128]),
)
@settings(max_examples=150, deadline=None)
def test_random_cases(
    library: ctypes.CDLL,
    pattern: AttentionPattern | BlockMask,
    seqlens: tuple[int, int],
    starts: tuple[int, int],
    page_size: int,
) -> None:
    check(library, pattern, *seqlens, *starts, page_size)
