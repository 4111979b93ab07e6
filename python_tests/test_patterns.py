"""Patterns against a definition in plain Python loops, and everything that follows from `visible`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from attention_cases import A, patterns_of_every_kind, random_mask
from attention_strategies import arithmetic_patterns
from hypothesis import given
from hypothesis import strategies as st

from longgen_kernels import AttentionPattern, BlockMask, pattern_from_dict
from longgen_kernels.patterns import MAX_POSITION, decode_pattern

PATTERNS = patterns_of_every_kind(32)
ARITHMETIC = {name: p for name, p in PATTERNS.items() if isinstance(p, AttentionPattern)}
MASKS = {name: p for name, p in PATTERNS.items() if isinstance(p, BlockMask)}
HEADS = 2
any_arithmetic = st.sampled_from(
    ["causal", "window", "window of blocks", "strided", "strided, window of blocks"]
).flatmap(arithmetic_patterns)


def sees(pattern: AttentionPattern | BlockMask, dense: list | None, p: int, j: int, head: int) -> bool:
    """The definition, one pair at a time."""
    if isinstance(pattern, BlockMask):
        row, column = p // pattern.block_size, j // pattern.block_size
        inside = 0 <= row < pattern.q_blocks and 0 <= column < pattern.k_blocks
        return inside and dense[head][row][column] and (j <= p or not pattern.is_causal)
    if not pattern.is_causal:
        return True
    if j > p:
        return False
    limited = False
    if pattern.window is not None:
        limited = True
        if p - j < pattern.window:
            return True
    if pattern.window_blocks is not None:
        limited = True
        if math.floor(p / pattern.block_size) - math.floor(j / pattern.block_size) < pattern.window_blocks:
            return True
    if pattern.stride is not None:
        phase = pattern.head_phase_offset + pattern.head_phase_step * head
        if (j // pattern.block_size + phase) % pattern.stride == 0:
            return True
    return not limited or j < pattern.sink


def by_definition(
    pattern: AttentionPattern | BlockMask, seqlen_q: int, seqlen_k: int, q_start: int, k_start: int, heads: int = HEADS
) -> list[list[list[bool]]]:
    dense = pattern.to_dense().tolist() if isinstance(pattern, BlockMask) else None
    return [
        [[sees(pattern, dense, q_start + i, k_start + r, h) for r in range(seqlen_k)] for i in range(seqlen_q)]
        for h in range(heads)
    ]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "q_start", "k_start"), [
    (53, 53, None, 0), (20, 45, None, 0), (45, 20, None, 0), (17, 19, 30, 8), (5, 30, 0, 3), (1, 1, None, 7),
])  # fmt: skip
@pytest.mark.parametrize("name", PATTERNS)
def test_visible_is_the_definition(name: str, seqlen_q: int, seqlen_k: int, q_start: int | None, k_start: int) -> None:
    pattern = PATTERNS[name]
    heads = pattern.heads if isinstance(pattern, BlockMask) else HEADS
    got = pattern.visible(seqlen_q, seqlen_k, heads=heads, q_start=q_start, k_start=k_start)
    start = k_start + seqlen_k - seqlen_q if q_start is None else q_start
    assert got.tolist() == by_definition(pattern, seqlen_q, seqlen_k, start, k_start, heads)


@given(pattern=any_arithmetic, seqlen_q=st.integers(1, 40), seqlen_k=st.integers(1, 40), k_start=st.integers(0, 70))
def test_visible_is_the_definition_of_any_pattern(
    pattern: AttentionPattern, seqlen_q: int, seqlen_k: int, k_start: int
) -> None:
    start = k_start + seqlen_k - seqlen_q
    got = pattern.visible(seqlen_q, seqlen_k, heads=HEADS, k_start=k_start)
    assert got.tolist() == by_definition(pattern, seqlen_q, seqlen_k, start, k_start)


def test_visible_of_a_small_strided_pattern_by_eye() -> None:
    """Blocks of 2, every third kept: blocks 0 and 3 in head 0, blocks 2 in head 1."""
    rows = A.strided(3, 2, window=1).visible(8, heads=2).int().tolist()
    assert rows[0][7] == [1, 1, 0, 0, 0, 0, 1, 1]
    assert rows[1][7] == [0, 0, 0, 0, 1, 1, 0, 1]
    assert rows[1][4] == [0, 0, 0, 0, 1, 0, 0, 0]


# -- what follows from visible ----------------------------------------------------------------------------------------


@given(pattern=any_arithmetic, seqlen_q=st.integers(0, 150), seqlen_k=st.integers(0, 150), heads=st.integers(1, 3))
def test_closed_form_counts_are_those_of_visible(
    pattern: AttentionPattern, seqlen_q: int, seqlen_k: int, heads: int
) -> None:
    assert (
        pattern.visible_pairs(seqlen_q, seqlen_k, heads=heads) == pattern.visible(seqlen_q, seqlen_k, heads=heads).sum()
    )
    if seqlen_k:
        last_row = pattern.visible(1, seqlen_k, heads=heads)[heads - 1, 0]
        assert pattern.kept_tokens(seqlen_k, heads - 1) == last_row.sum()


@pytest.mark.parametrize("name", PATTERNS)
def test_density_is_the_share_of_the_dense_pattern(name: str) -> None:
    pattern, n = PATTERNS[name], 61
    dense = n * (n + 1) // 2 if pattern.causal_only else n * n
    heads = 1 if isinstance(pattern, BlockMask) else HEADS
    assert pattern.density(n, heads=heads) == pytest.approx(
        float(pattern.visible(n, heads=heads).sum() / (dense * heads))
    )
    assert pattern.visible_pairs(n, heads=heads) == pattern.visible(n, heads=heads).sum()


def test_dense_patterns_have_density_one() -> None:
    assert A.causal().density(1000) == A.bidirectional().density(1000) == 1.0
    assert A.causal().is_dense
    assert A.bidirectional().is_dense
    assert not any(p.is_dense for name, p in PATTERNS.items() if name not in ("causal", "bidirectional"))


@pytest.mark.parametrize("block", [4, 16, 24])
@pytest.mark.parametrize("name", PATTERNS)
def test_visible_blocks_are_those_of_visible(name: str, block: int) -> None:
    pattern, n = PATTERNS[name], 60
    head = (pattern.heads if isinstance(pattern, BlockMask) else HEADS) - 1
    mask = pattern.visible(n, heads=head + 1)[head]
    lo, hi = 19, 37

    def blocks_of(tile_of: Callable[[int, int], torch.Tensor]) -> tuple[list[int], list[int]]:
        tiles = [tile_of(x, min(x + block, n)) for x in range(0, n, block)]
        full = [i for i, tile in enumerate(tiles) if tile.all()]
        return full, [i for i, tile in enumerate(tiles) if tile.any() and i not in full]

    assert pattern.visible_key_blocks(lo, hi, n, block, head) == blocks_of(lambda x, y: mask[lo:hi, x:y])
    assert pattern.visible_query_blocks(lo, hi, n, block, head) == blocks_of(lambda x, y: mask[x:y, lo:hi])


@pytest.mark.parametrize("name", ARITHMETIC)
def test_a_dropped_key_never_comes_back(name: str) -> None:
    pattern = ARITHMETIC[name]
    if not pattern.is_cache_friendly:
        assert name == "bidirectional"
        return
    for head in pattern.visible(80, heads=HEADS):
        for j in range(80):
            column = head[j:, j].int()  # from the key's own row on: seen, then not
            assert (column.diff() <= 0).all(), f"key {j} comes back"


def test_a_block_mask_may_bring_keys_back() -> None:
    mask = BlockMask.from_dense(torch.tensor([[True, False, False], [False, True, False], [True, False, True]]), 16)
    assert not mask.is_cache_friendly
    assert mask.visible(48)[0, [15, 16, 32], 0].tolist() == [True, False, True]


def test_phases_and_shards_of_heads() -> None:
    pattern = A.strided(5, 4, window=3, head_phase_step=2, head_phase_offset=4)
    assert [pattern.phase(h) for h in range(6)] == [4, 1, 3, 0, 2, 4]
    whole = pattern.visible(50, heads=6)
    for first in (0, 2, 5):
        assert torch.equal(pattern.shard_heads(first).visible(50), whole[first : first + 1])
    assert torch.equal(pattern.shard_heads(2).visible(50, heads=3), whole[2:5])
    assert A.sink_window(1, 2).shard_heads(3) == A.sink_window(1, 2)
    assert A.causal().phase(7) == 0


def test_heads_together_cover_the_whole_context() -> None:
    """Heterogeneous heads keep every block in some head; homogeneous ones keep one and the same block in stride."""
    heterogeneous, homogeneous = (A.strided(4, 8, window=0, head_phase_step=step) for step in (1, 0))
    last = heterogeneous.visible(128, heads=4)[:, -1]
    assert (last.sum(0) == 1).all()
    assert homogeneous.visible(128, heads=4)[:, -1].sum(1).tolist() == [32] * 4
    assert torch.equal(*homogeneous.visible(128, heads=2))


# -- values, and what they are made of --------------------------------------------------------------------------------


def test_patterns_are_values() -> None:
    one, same, other = A.sink_window(4, 64), A.sink_window(sink=4, window=64), A.sink_window(4, 65)
    assert one == same
    assert hash(one) == hash(same)
    assert len({one, same, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.sink = 3


def test_block_masks_are_frozen_and_compare_by_identity() -> None:
    one, other = (random_mask(2, 2, 16) for _ in range(2))
    assert one != other
    assert len({one, other, one}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.block_size = 32


@pytest.mark.parametrize("name", PATTERNS)
def test_a_dict_round_trip_keeps_the_pattern(name: str) -> None:
    pattern = PATTERNS[name]
    back = pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    heads = pattern.heads if isinstance(pattern, BlockMask) else HEADS
    assert torch.equal(back.visible(50, heads=heads), pattern.visible(50, heads=heads))
    assert back.to_dict() == pattern.to_dict()
    if isinstance(pattern, AttentionPattern):
        assert back == pattern


@pytest.mark.parametrize("name", PATTERNS)
def test_an_operator_round_trip_keeps_the_pattern(name: str) -> None:
    pattern = PATTERNS[name]
    code = pattern.encode()
    assert all(type(number) is int for number in code)
    if isinstance(pattern, AttentionPattern):
        assert decode_pattern(code) == pattern
        return
    back = decode_pattern(code, pattern.rows, pattern.cols)
    assert torch.equal(back.to_dense(), pattern.to_dense())
    assert (back.block_size, back.is_causal) == (pattern.block_size, pattern.is_causal)


BAD_PATTERNS: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "is_causal must be a bool, got 1", lambda: A(is_causal=1)),
    (TypeError, "sink must be an int, got float 4.0", lambda: A.sink_window(4.0, 8)),
    (TypeError, "window must be an int, got bool True", lambda: A.sink_window(4, True)),
    (ValueError, rf"sink must be in \[0, {MAX_POSITION}\], got -1", lambda: A.sink_window(-1, 8)),
    (ValueError, rf"window must be in \[0, {MAX_POSITION}\], got -2", lambda: A.sink_window(0, -2)),
    (ValueError, rf"window must be in .*, got {MAX_POSITION + 1}", lambda: A.sink_window(0, MAX_POSITION + 1)),
    (ValueError, "window_blocks must be in .* got -1", lambda: A.sink_window(0, window_blocks=-1, block_size=8)),
    (ValueError, r"window_blocks \* block_size must", lambda: A.sink_window(0, window_blocks=1 << 20, block_size=2048)),
    (ValueError, "not both; got window=8, window_blocks=2", lambda: A(window=8, window_blocks=2, block_size=8)),
    (ValueError, "sink_window: give window", lambda: A.sink_window(4)),
    (ValueError, "strided: give window", lambda: A.strided(4, 8)),
    (ValueError, "a sink of 3 needs a window", lambda: A(sink=3)),
    (ValueError, "strided blocks need a window", lambda: A(stride=3, block_size=8)),
    (ValueError, r"stride must be in \[1, 1048576\], got 0", lambda: A.strided(0, 8, window=1)),
    (ValueError, "block_size must be a power of two, got 12", lambda: A.strided(2, 12, window=1)),
    (ValueError, r"block_size must be in \[1, .*\], got 0", lambda: A.strided(2, 0, window=1)),
    (TypeError, "block_size must be an int, got NoneType", lambda: A(stride=2, window=1)),
    (ValueError, "block_size=8 has no effect", lambda: A(window=1, block_size=8)),
    (ValueError, "head phases have no effect without stride", lambda: A(window=1, head_phase_step=1)),
    (ValueError, "head_phase_offset must be in .* got -1", lambda: A.strided(2, 8, window=1, head_phase_offset=-1)),
    (ValueError, "is_causal=False is dense only", lambda: A(is_causal=False, window=4)),
    (ValueError, r"first_kv_head must be in \[0, .*\], got -1", lambda: A.causal().shard_heads(-1)),
    (ValueError, r"seqlen must be in \[1, .*\], got 0", lambda: A.causal().density(0)),
    (ValueError, r"seqlen must be in \[0, .*\], got -1", lambda: A.causal().kept_tokens(-1)),
    (TypeError, "expected a dict, got list", lambda: pattern_from_dict([])),
    (ValueError, "kind must be 'arithmetic' or 'block_mask', got None", lambda: pattern_from_dict({"sink": 1})),
    (ValueError, "fit kind 'arithmetic': .*colour", lambda: pattern_from_dict({"kind": "arithmetic", "colour": 1})),
    (ValueError, "fit kind 'block_mask'", lambda: pattern_from_dict({"kind": "block_mask", "indptr": [[0, 0]]})),
    (TypeError, "mask must be a bool tensor, got torch.float32", lambda: BlockMask.from_dense(torch.ones(2, 2), 16)),
    (TypeError, "mask must be a bool tensor, got list", lambda: BlockMask.from_dense([[True]], 16)),
    (ValueError, "mask must be .heads, q_blocks, k_blocks.", lambda: BlockMask.from_dense(torch.ones(2).bool(), 16)),
    (ValueError, "none of them 0", lambda: BlockMask.from_dense(torch.ones(2, 0).bool(), 16)),
    (ValueError, "block_size must be at least 16, got 8", lambda: BlockMask.from_dense(torch.ones(2, 2).bool(), 8)),
    (ValueError, "must be a power of two, got 48", lambda: BlockMask.from_dense(torch.ones(2, 2).bool(), 48)),
    (TypeError, "indptr must be an integer tensor", lambda: from_csr([0.0, 1.0], [0])),
    (TypeError, "indices must be an integer tensor", lambda: from_csr([0, 1], [True])),
    (ValueError, r"indptr must be \(heads, q_blocks \+ 1\)", lambda: from_csr([0], [0])),
    (ValueError, "indptr must run from 0 to nnz=2", lambda: from_csr([1, 2], [0, 1])),
    (ValueError, "indptr must run from 0 to nnz=3", lambda: from_csr([0, 2], [0, 1, 1])),
    (ValueError, "without gaps over the heads", lambda: from_csr([[0, 1], [2, 3]], [0, 1, 1])),
    (ValueError, "indptr must not decrease", lambda: from_csr([0, 2, 1, 2], [0, 1])),
    (ValueError, r"indices must be in \[0, 3\), got 0..3", lambda: from_csr([0, 2], [0, 3])),
    (ValueError, r"indices must be in \[0, 3\), got -1..1", lambda: from_csr([0, 2], [-1, 1])),
    (ValueError, "indptr is on cpu, indices on meta", lambda: from_csr([0, 1], torch.zeros(1, device="meta").int())),
]  # fmt: skip


def from_csr(indptr: list, indices: list | torch.Tensor) -> BlockMask:
    return BlockMask.from_csr(torch.tensor(indptr), torch.as_tensor(indices), k_blocks=3, block_size=16)


@pytest.mark.parametrize(("error", "message", "make"), BAD_PATTERNS, ids=[message for _, message, _ in BAD_PATTERNS])
def test_an_impossible_pattern_says_what_is_wrong(
    error: type[Exception], message: str, make: Callable[[], object]
) -> None:
    with pytest.raises(error, match=message):
        make()


# -- block masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_block_masks_hold_rows_and_columns_of_the_dense_mask(name: str) -> None:
    mask = MASKS[name]
    dense = mask.to_dense()
    for packed, lines in ((mask.rows, dense), (mask.cols, dense.mT)):
        n = lines.shape[0] * lines.shape[1]
        offsets, entries = packed[: n + 1].tolist(), packed[n + 1 :].tolist()
        assert offsets[0] == 0
        for line, (lo, hi) in zip(lines.flatten(0, 1), itertools.pairwise(offsets), strict=True):
            assert entries[lo:hi] == line.nonzero()[:, 0].tolist()
    if mask.is_causal:
        assert not dense.triu(1).any()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_a_mask_from_csr_is_the_mask_from_dense(is_causal: bool, dtype: torch.dtype) -> None:
    """Unsorted and repeated indices, an empty row, two heads."""
    indptr, indices = torch.tensor([[0, 2, 2, 4], [4, 7, 8, 8]], dtype=dtype), torch.tensor([2, 0, 1, 1, 2, 1, 0, 3])
    dense = torch.zeros(2, 3, 4, dtype=torch.bool)
    for head, row, column in [(0, 0, 0), (0, 0, 2), (0, 2, 1), (1, 0, 0), (1, 0, 1), (1, 0, 2), (1, 1, 3)]:
        dense[head, row, column] = True
    want = BlockMask.from_dense(dense, 32, is_causal=is_causal)
    got = BlockMask.from_csr(indptr, indices.to(dtype), k_blocks=4, block_size=32, is_causal=is_causal)
    assert torch.equal(got.to_dense(), want.to_dense())
    assert torch.equal(got.visible(70, 100, heads=2), want.visible(70, 100, heads=2))


def test_room_for_more_blocks_changes_nothing() -> None:
    dense = torch.rand(2, 5, 7) < 0.4
    tight, roomy = (BlockMask.from_dense(dense, 16, is_causal=False, max_blocks=n) for n in (None, 70))
    assert roomy.rows.numel() > tight.rows.numel()
    assert torch.equal(roomy.to_dense(), dense)
    assert torch.equal(tight.to_dense(), dense)


def test_a_mask_larger_than_the_sequence_serves_its_prefix() -> None:
    large = random_mask(8, 8, 16, seed=3)
    small = BlockMask.from_dense(large.to_dense()[:, :3, :3], 16)
    assert torch.equal(large.visible(45), small.visible(45))
    assert not large.visible(10, 10, q_start=128, k_start=0).any()  # beyond the mask nothing is visible


def test_a_mask_moves_between_devices() -> None:
    mask = random_mask(2, 2, 16)
    assert mask.to("meta").device.type == "meta"
    assert torch.equal(mask.to("cpu").to_dense(), mask.to_dense())


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strided blocks with per-head phases", "block mask of two heads"])
def test_a_plot_shows_the_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    import matplotlib.pyplot as plt

    axes = PATTERNS[name].plot(40, head=1)
    assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), PATTERNS[name].visible(40, heads=2)[1])
    assert "head 1" in axes.get_title()
    assert PATTERNS[name].plot(20, ax=axes) is axes
    plt.close(axes.figure)


def test_a_mask_of_more_blocks_than_int32_counts_is_refused() -> None:
    huge = torch.ones(1, dtype=torch.bool).expand(1 << 10, 1 << 11, 1 << 10)  # one byte of memory
    with pytest.raises(ValueError, match="must have less than 2147483648 blocks"):
        BlockMask.from_dense(huge, 16)
