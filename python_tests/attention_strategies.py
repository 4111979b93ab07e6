"""Random attention cases for hypothesis."""

from __future__ import annotations

import torch
from attention_cases import BIG, INTERPRETED, TILE, Case, random_mask
from hypothesis import strategies as st

from longgen_kernels import AttentionPattern

KINDS = [
    "causal",
    "bidirectional",
    "window",
    "window of blocks",
    "strided",
    "strided, window of blocks",
    "causal block mask",
    "bidirectional block mask",
]
# Smaller and not smaller than a tile's columns, which kernels are compiled apart for.
SMALL_BLOCKS, LARGE_BLOCKS = [1, 2, 4, 8, 16], [TILE if INTERPRETED else TILE // 2, 128, 256, 512]
PACKINGS = ["dense", "packed", "packed with starts"]
Shape = tuple[torch.dtype, int, int]  # dtype, head_dim, query heads per kv head


@st.composite
def random_cases(draw: st.DrawFn, kind: str, shapes: list[Shape], longest: int = 4 * TILE) -> Case:
    """Any case of one kind of pattern. What kernels are compiled for is drawn from `shapes` and the packings;
    everything else varies freely."""
    packing = draw(st.sampled_from(PACKINGS))
    is_packed = packing != "dense"
    # Two shapes for each kind and packing, so that the number of compiled kernels stays small.
    variant = len(PACKINGS) * KINDS.index(kind) + PACKINGS.index(packing)
    which = draw(st.integers(0, 1))
    dtype, head_dim, group = shapes[(variant + which) % len(shapes)]
    kv_heads = draw(st.integers(1, 3))

    batch = draw(st.integers(1, 4 if is_packed else 2))
    lengths, starts = (_per_sequence(one, batch, is_packed) for one in (_lengths(longest), _starts()))
    seqlens_q = draw(lengths)
    seqlens_k = draw(st.one_of(st.just(seqlens_q), lengths))
    q_starts = k_starts = None
    if packing == "packed with starts" or (not is_packed and draw(st.booleans())):
        q_starts, k_starts = draw(starts), draw(starts)

    if "block mask" in kind:
        q_end, k_end = (max(n) + max(at or (0,)) for n, at in ((seqlens_q, q_starts), (seqlens_k, k_starts)))
        block_size = [16, 32, 64, 128][variant % 4]
        q_blocks, k_blocks = (-(-max(end, 1) // block_size) for end in (max(q_end, k_end), k_end))
        pattern = random_mask(
            q_blocks + draw(st.integers(0, 2)),
            k_blocks + draw(st.integers(0, 2)),
            block_size,
            heads=draw(st.sampled_from([1, kv_heads, kv_heads * group])),
            seed=draw(st.integers(0, 99)),
            density=draw(st.sampled_from([0.1, 0.5, 1.0])),
            is_causal=kind == "causal block mask",
        )
    else:
        pattern = draw(arithmetic_patterns(kind, SMALL_BLOCKS if which else LARGE_BLOCKS))
    return Case(
        kind,
        pattern,
        seqlens_q,
        seqlens_k,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        packed=is_packed,
        q_starts=q_starts,
        k_starts=k_starts,
        spare_rows=draw(st.sampled_from([0, 3, TILE])) if is_packed else 0,
        layout=draw(st.sampled_from(["contiguous", "heads first"] + ["fused"] * (seqlens_q == seqlens_k))),
        upstream=draw(st.sampled_from(["both", "out", "lse", "sum"])),
    )


def _per_sequence(one: st.SearchStrategy[int], batch: int, differ: bool) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[one] * batch) if differ else one.map(lambda n: (n,) * batch)


def _lengths(longest: int) -> st.SearchStrategy[int]:
    """Any length, and often one close to the end of a tile."""
    halves, beside = st.integers(0, 2 * longest // TILE), st.integers(-2, 2)
    return st.one_of(st.integers(0, longest), st.builds(lambda n, d: max(0, n * TILE // 2 + d), halves, beside))


def _starts() -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 2 * TILE), st.just(3 * TILE))


def arithmetic_patterns(
    kind: str, block_sizes: list[int] = SMALL_BLOCKS + LARGE_BLOCKS
) -> st.SearchStrategy[AttentionPattern]:
    """Any `AttentionPattern` of one of `KINDS`."""
    if kind == "causal":
        return st.just(AttentionPattern.causal())
    if kind == "bidirectional":
        return st.just(AttentionPattern.bidirectional())
    block_size = st.sampled_from(block_sizes)
    tokens = st.one_of(st.integers(0, 3 * TILE), st.sampled_from([0, 1, TILE, BIG]))
    limit = {"window_blocks": st.integers(0, 4)} if "blocks" in kind else {"window": tokens}
    if "strided" not in kind:
        blocks = {"block_size": block_size} if "blocks" in kind else {}
        return st.builds(AttentionPattern.sink_window, tokens, **limit, **blocks)
    phases = {"head_phase_step": st.integers(0, 5), "head_phase_offset": st.integers(0, 9)}
    sink = st.one_of(st.just(0), tokens)
    return st.builds(AttentionPattern.strided, st.integers(1, 6), block_size, sink=sink, **limit, **phases)
