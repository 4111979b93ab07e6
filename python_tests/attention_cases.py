"""Attention problems that the tests share, by name.

A case is a shape, a pattern and how the tensors lie in memory. Every test file runs the same cases on its backend.
Lengths count in tiles, so that a case crosses the same tile boundaries under Triton's interpreter as on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longgen_kernels import AttentionPattern, BlockMask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 32 if INTERPRETED else 128  # the longest side of a kernel's tile
NAN = float("nan")

A = AttentionPattern
BIG = 1 << 30  # positions, windows and sinks stay below or at this


@dataclass(frozen=True)
class Case:
    """One attention problem; `seqlens_q` and `seqlens_k` hold one length per sequence, all equal unless `packed`."""

    name: str
    pattern: AttentionPattern | BlockMask
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    q_heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    packed: bool = False
    q_starts: tuple[int, ...] | None = None
    k_starts: tuple[int, ...] | None = None
    spare_rows: int = 0  # of packed tensors, behind their last sequence; the inputs hold NaN there
    # "heads first": (batch, heads, seqlen, head_dim); "fused": slices of one projection; "odd": rows at odd addresses
    layout: str = "contiguous"
    upstream: str = "both"  # which results have a gradient: "both", "out", "lse", "sum" (one number for all of out)

    def __str__(self) -> str:
        return self.name.replace(" ", "_")

    def at(self, dtype: torch.dtype, head_dim: int) -> Case:
        """The case in another precision and head_dim."""
        return replace(self, dtype=dtype, head_dim=head_dim)


def dense(
    name: str,
    pattern: AttentionPattern | BlockMask,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    batch: int = 2,
    q_start: int | None = None,
    k_start: int | None = None,
    **fields: Any,
) -> Case:
    """A case whose sequences have one length."""
    return Case(
        name,
        pattern,
        (seqlen_q,) * batch,
        (seqlen_q if seqlen_k is None else seqlen_k,) * batch,
        q_starts=None if q_start is None else (q_start,) * batch,
        k_starts=None if k_start is None else (k_start,) * batch,
        **fields,
    )


def packed(
    name: str,
    pattern: AttentionPattern | BlockMask,
    seqlens_q: tuple[int, ...],
    seqlens_k: tuple[int, ...] | None = None,
    **fields: Any,
) -> Case:
    """A case with one length per sequence."""
    return Case(name, pattern, seqlens_q, seqlens_q if seqlens_k is None else seqlens_k, packed=True, **fields)


def random_mask(
    q_blocks: int, k_blocks: int, block_size: int, *, heads: int = 1, seed: int = 0, density: float = 0.5, **how: Any
) -> BlockMask:
    """A block mask with an empty block row and an empty block column in it, as far as it has two of each."""
    mask = torch.rand(heads, q_blocks, k_blocks, generator=torch.Generator().manual_seed(seed)) < density
    mask[:, 1:2] = False
    mask[:, :, 1:2] = False
    return BlockMask.from_dense(mask, block_size, **how)


# -- tensors ----------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """The tensors of a case: arguments of the attention functions, and the gradients that arrive from above."""

    case: Case
    pattern: AttentionPattern | BlockMask
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, contiguous, in another dtype."""
        q, k, v = (x.to(dtype, memory_format=torch.contiguous_format) for x in (self.q, self.k, self.v))
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        dout = None if self.dout is None else self.dout.to(dtype)
        dlse = None if self.dlse is None else self.dlse.to(lse_dtype)
        return replace(self, q=q, k=k, v=v, dout=dout, dlse=dlse)


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Random tensors in the case's layout; memory between and behind the rows holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = (case.q_heads, case.kv_heads, case.kv_heads)

    def leading(seqlens: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(seqlens) + case.spare_rows,) if case.packed else (len(seqlens), seqlens[0])

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=generator).to(dtype)
        return x.to(device)

    shapes = [
        (*leading(lens), heads, case.head_dim)
        for lens, heads in zip((case.seqlens_q, case.seqlens_k, case.seqlens_k), counts, strict=True)
    ]
    dense_qkv = [normal(shape, case.dtype) for shape in shapes]
    if case.layout == "fused":
        fused = torch.full((*shapes[0][:-2], sum(counts) + 1, case.head_dim), NAN, dtype=case.dtype, device=device)
        views = fused[..., :-1, :].split(counts, dim=-2)
    else:
        views = [_storage(shape, case.layout, case.dtype, device) for shape in shapes]
    for view, values in zip(views, dense_qkv, strict=True):
        view.copy_(values)
    if case.packed and case.spare_rows:
        for view in views:
            view[-case.spare_rows :] = NAN
    q, k, v = views

    dout = dlse = None
    if case.upstream in ("both", "out"):
        dout = _storage(shapes[0], case.layout, case.dtype, device).copy_(normal(shapes[0], case.dtype))
    if case.upstream == "sum":
        dout = torch.ones((), dtype=case.dtype, device=device).expand(shapes[0])
    if case.upstream in ("both", "lse"):
        rows_first = normal((*shapes[0][:-1], 1), torch.float32)[..., 0]
        dlse = rows_first.transpose(-1, -2)
        dlse = dlse if case.layout == "heads first" else dlse.clone(memory_format=torch.contiguous_format)

    inputs = Inputs(case, case.pattern, q, k, v, dout, dlse)
    if isinstance(case.pattern, BlockMask):
        inputs.pattern = case.pattern.to(device)
    if case.packed:
        inputs.cu_q, inputs.cu_k = (cumulated(lens, device) for lens in (case.seqlens_q, case.seqlens_k))
        inputs.q_starts, inputs.k_starts = (
            None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
            for starts in (case.q_starts, case.k_starts)
        )
    return inputs


def cumulated(seqlens: tuple[int, ...], device: str) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *seqlens]).cumsum(0).to(device, torch.int32)


def _storage(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """A NaN-filled tensor of `shape` (..., rows, heads, head_dim) in memory as `Case.layout` says."""
    *batch, rows, heads, head_dim = shape
    if layout == "heads first":
        return torch.full((*batch, heads, rows, head_dim), NAN, dtype=dtype, device=device).transpose(-2, -3)
    odd = layout == "odd"
    return torch.full((*batch, rows, heads, head_dim + odd), NAN, dtype=dtype, device=device)[..., odd:]


# -- named cases ------------------------------------------------------------------------------------------------------


def patterns_of_every_kind(tile: int) -> dict[str, AttentionPattern | BlockMask]:
    """Patterns for sequences of up to four tiles."""
    half = tile // 2
    return {
        "causal": A.causal(),
        "bidirectional": A.bidirectional(),
        "sliding window": A.sink_window(0, tile + 3),
        "sink and window": A.sink_window(5, tile // 2 + 1),
        "sink of more than a tile": A.sink_window(tile + 9, 7),
        "sink without a window": A.sink_window(half, 0),
        "window of the token itself": A.sink_window(0, 1),
        "window of blocks": A.sink_window(3, window_blocks=2, block_size=half),
        "window of no blocks": A.strided(2, half, window_blocks=0, head_phase_step=0),
        "strided blocks": A.strided(3, half, window=tile, sink=4, head_phase_step=0),
        "strided blocks with per-head phases": A.strided(4, half, window=half + 3, head_phase_step=3),
        "strided blocks and a window of blocks": A.strided(3, half, window_blocks=1, sink=half + 1),
        "strided blocks smaller than a tile": A.strided(3, max(tile // 8, 2), window=9),
        "strided blocks of one token": A.strided(5, 1, window=3, sink=1),
        "strided blocks larger than a tile": A.strided(2, 2 * tile, window=5, head_phase_offset=1),
        "stride of one": A.strided(1, half, window=0),
        "numbers as large as they may be": A.strided(1 << 20, 1 << 20, window=BIG - 1, sink=BIG, head_phase_step=BIG),
        "causal block mask": random_mask(8, 8, half, seed=1),
        "bidirectional block mask": random_mask(8, 8, half, seed=2, is_causal=False),
        "block mask of two heads": random_mask(4, 4, tile, heads=2, seed=3),
        "block mask with blocks of several tiles": random_mask(2, 2, 4 * tile, density=1.0),
    }


def named_cases(tile: int = TILE) -> list[Case]:
    """What broke other kernels, by name; lengths count in tiles of `tile` tokens."""
    half = tile // 2
    strided = A.strided(3, half, window=half + 3, sink=3)
    window = A.sink_window(5, half + 1)
    unseen = A.strided(4, half, window=0, head_phase_offset=2)
    mask = random_mask(8, 8, half, heads=2, seed=4, is_causal=False)
    long = 3 * tile + 5
    return [
        dense("lengths that are no multiple of a block", strided, long),
        dense("a block mask cut off by the length", random_mask(8, 8, half, seed=5), long),
        dense("rows that see nothing for want of a window", unseen, 2 * tile),
        dense("rows that see nothing as they come before the keys", A.causal(), 2 * tile, q_start=0, k_start=tile + 3),
        dense("rows that see nothing of a block mask", random_mask(4, 4, half, seed=6), 2 * tile),
        dense("no row sees anything", A.sink_window(0, 0), tile + 3),
        dense("more queries than keys", window, 2 * tile + 7, tile + 3),
        dense("more keys than queries", strided, half + 3, long),
        dense("one query", strided, 1, long),
        dense("one key", window, tile + 1, 1),
        dense("more queries than keys in a bidirectional block mask", mask, long, tile + 5, q_start=0),
        dense("no keys", strided, 5, 0),
        dense("no queries", strided, 0, 5),
        packed("only sequences of length zero", window, (0, 0)),
        packed("zero-length sequences in a packed batch", strided, (0, tile + 1, 0, 0, 5, 0)),
        packed("zero-length queries or keys in a packed batch", window, (0, tile + 1, 7, 0, 5), (9, half, 0, 0, tile)),
        packed("zero-length sequences under a block mask", mask, (0, long, 0, 5), (3, long, 0, tile + 5)),
        packed("packed rows behind the last sequence", strided, (tile + 2, 3), spare_rows=tile + 1),
        packed("packed rows behind the last sequence of a block mask", mask, (tile + 2, 3), spare_rows=tile + 1),
        packed(
            "a packed batch of more sequences than a tile has rows", window, (1, 3, 0, 2) * (tile // 4 + 1), q_heads=1
        ),
        packed("packed more keys than queries", strided, (3, tile + 1), (long, tile + 1)),
        packed("packed bidirectional", A.bidirectional(), (half, long), (long, 3)),
        dense("a sequence shorter than the window", A.sink_window(2, 4 * tile), half + 3),
        dense("a sequence shorter than the sink", A.sink_window(2 * tile, 4), half + 3),
        dense("a sequence shorter than one tile", strided, 5),
        dense("a sequence shorter than one strided block", A.strided(2, 4 * tile, window=3), tile + 3),
        packed("packed sequences shorter than window, sink and tile", A.sink_window(tile, tile), (3, 1, 7, tile - 1)),
        dense("head_dim 64 backward", strided, tile + 5, head_dim=64),
        dense("query groups with per-head phases", strided, 2 * tile + 5, q_heads=6, kv_heads=3),
        dense("every query head with keys of its own", strided, 2 * tile + 5, q_heads=3, kv_heads=3),
        dense("one kv head for all", strided, 2 * tile + 5, q_heads=4),
        packed("packed query groups with per-head phases", strided, (tile + 5, 9), q_heads=6, kv_heads=3),
        dense("a block mask per kv head", random_mask(8, 8, half, heads=2, seed=7), long, q_heads=4, kv_heads=2),
        dense("a block mask per query head", random_mask(8, 8, half, heads=4, seed=8), long, q_heads=4, kv_heads=2),
        dense("queries that start between two tiles", strided, tile + 1, long, q_start=tile + half + 3),
        dense("keys that start between two tiles", strided, tile + 1, k_start=half + 7),
        dense("queries far behind the keys", strided, half, tile, q_start=5 * tile + 1, k_start=3),
        dense("keys deep inside a strided block", A.strided(2, 32 * tile, window=5), tile + 9, k_start=25 * tile),
        dense(
            "keys across the end of a block that is not strided",
            A.strided(2, 32 * tile, window=5, head_phase_offset=1),
            tile + 9,
            k_start=31 * tile + half,
        ),
        dense("a block mask from a later position", mask, tile + 3, tile, q_start=tile + 5, k_start=half),
        dense("positions just below their limit", strided, tile, q_start=BIG - tile, k_start=BIG - tile),
        packed("packed with starts per sequence", strided, (tile, 5), (7, long), q_starts=(9, tile), k_starts=(2, 3)),
        packed("a packed block mask with starts", mask, (tile, 5), (7, tile), q_starts=(9, tile), k_starts=(half, 3)),
        dense("heads first in memory", strided, 2 * tile + 5, layout="heads first", kv_heads=2),
        packed("packed heads first in memory", strided, (tile + 5, 9), layout="heads first", kv_heads=2),
        dense("slices of a fused projection", strided, 2 * tile + 5, layout="fused", kv_heads=2),
        packed("packed slices of a fused projection", strided, (tile + 5, 9), layout="fused", kv_heads=2),
        dense("rows at odd addresses", strided, tile + 5, layout="odd", kv_heads=2),
        packed("packed rows at odd addresses", strided, (tile + 5, 9), layout="odd", kv_heads=2),
        dense("gradient through the LSE alone", strided, tile + 5, upstream="lse"),
        packed("packed gradient through the LSE alone", strided, (tile + 5, 3), upstream="lse"),
        dense("gradient through the output alone", strided, tile + 5, upstream="out"),
        dense("the gradient of a sum", strided, tile + 5, upstream="sum"),
    ]
