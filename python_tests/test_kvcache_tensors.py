"""Attention to caches that are plain tensors: (batch, seqlen, kv_heads, head_dim), or pages and a block table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import PATTERNS, A, Everything, assert_close, new_tokens
from test_kv_cache import backends, settings_of
from torch import Tensor

from longgen_kernels import AttentionPattern, longgen_attn_with_kvcache

SEQLEN = 160
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 100, SEQLEN - 16]
KINDS = ["causal", "sink and window", "window of blocks", "strided blocks with per-head phases", "small strided blocks"]


def filled(pattern: AttentionPattern, backend: str, lengths: list[int] = LENGTHS) -> tuple[Everything, Tensor, Tensor]:
    """A model with sequences of these lengths, and its k and v in tensors of SEQLEN tokens with NaN behind them."""
    model = Everything(pattern, len(lengths), 2, **settings_of(backend))
    _, k, v = new_tokens(model, SEQLEN, 1)
    model.append(k, v, lengths)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = float("nan")
    return model, k, v


def in_pages(x: Tensor, page_size: int, table: Tensor, pages: int) -> Tensor:
    """The tensor (batch, seqlen, kv_heads, head_dim) as pages; those that the table does not name hold NaN."""
    paged = torch.full((pages, page_size, *x.shape[2:]), float("nan"), dtype=x.dtype, device=x.device)
    paged[table.long()] = x.unflatten(1, (-1, page_size))
    return paged


def lengths_of(model: Everything) -> Tensor:
    return torch.tensor(model.lengths, dtype=torch.int32, device=model.device)


@backends
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_cache(kind: str, n: int, backend: str, poison: Any) -> None:
    model, k, v = filled(PATTERNS[kind], backend)
    lengths = lengths_of(model)
    q = new_tokens(model, n, 4)[0]
    options = {"cache_seqlens": lengths, "pattern": PATTERNS[kind], "return_lse": True, "backend": backend}
    got = longgen_attn_with_kvcache(q, (k, v), **options)
    assert_close(got, model.attend(q, [length - n for length in model.lengths]))


@backends
@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_written_and_seen_and_lengths_stay(kind: str, backend: str, poison: Any) -> None:
    model, k, v = filled(PATTERNS[kind], backend)
    lengths, starts = lengths_of(model), model.lengths
    q, new_k, new_v = new_tokens(model, 3, 4)
    counts = [i % 4 for i in range(model.batch)]
    options = {"cache_seqlens": lengths, "pattern": PATTERNS[kind], "return_lse": True, "backend": backend}
    on_device = torch.tensor(counts, dtype=torch.int32, device=model.device)
    got = longgen_attn_with_kvcache(q, (k, v), new_k, new_v, counts=on_device, **options)
    model.append(new_k, new_v, counts)
    assert_close(got, model.attend(q, starts), counts)
    assert lengths.tolist() == starts
    for b, length in enumerate(model.lengths):
        assert torch.equal(k[b, :length], model.k[b])
        assert torch.equal(v[b, :length], model.v[b])
        assert k[b, length:].isnan().all()


@backends
@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("kind", ["causal", "strided blocks with per-head phases"])
def test_paged_cache(kind: str, page_size: int, backend: str, poison: Any) -> None:
    model, k, v = filled(PATTERNS[kind], backend)
    per_sequence = SEQLEN // page_size
    pages = 2 * model.batch * per_sequence
    names = torch.randperm(pages)[: pages // 2].view(model.batch, per_sequence)
    table = names.to(model.device, torch.int32)
    cache = tuple(in_pages(x, page_size, table, pages) for x in (k, v))
    options = {"cache_seqlens": lengths_of(model), "block_table": table, "pattern": PATTERNS[kind], "backend": backend}
    q, new_k, new_v = new_tokens(model, 2, 4)
    starts = model.lengths
    got = longgen_attn_with_kvcache(q, cache, return_lse=True, **options)
    assert_close(got, model.attend(q, [length - 2 for length in starts]))
    got = longgen_attn_with_kvcache(q, cache, new_k, new_v, return_lse=True, **options)
    model.append(new_k, new_v)
    assert_close(got, model.attend(q, starts))


@backends
def test_pages_that_a_table_does_not_have_are_left_alone(backend: str, poison: Any) -> None:
    """Entries of -1 behind a sequence's end: not read, not written."""
    model, k, v = filled(A.causal(), backend, [20, 32])
    table = torch.arange(2 * SEQLEN // 16, dtype=torch.int32, device=model.device).view(2, -1)
    cache = tuple(in_pages(x, 16, table, table.numel()) for x in (k, v))
    table = table.clone()
    table[:, 2:] = -1
    before = [x.clone() for x in cache]
    q, new_k, new_v = new_tokens(model, 1, 2)
    options = {"cache_seqlens": lengths_of(model), "block_table": table, "backend": backend, "return_lse": True}
    out, _ = longgen_attn_with_kvcache(q, cache, new_k, new_v, **options)
    assert not out.isnan().any()
    changed = [(x != y).any(-1).any(-1) & ~(x.isnan() & y.isnan()).all(-1).all(-1)
               for x, y in zip(cache, before, strict=True)]  # fmt: skip
    for rows in changed:
        assert rows.nonzero().tolist() == [[1, 4]]  # token 20 of the first sequence


@backends
def test_tokens_past_the_end_of_the_memory_are_dropped(backend: str, poison: Any) -> None:
    model, k, v = filled(A.causal(), backend, [SEQLEN, SEQLEN - 1])
    q, new_k, new_v = new_tokens(model, 2, 2)
    options = {"cache_seqlens": lengths_of(model), "backend": backend, "return_lse": True}
    out, _ = longgen_attn_with_kvcache(q, (k, v), new_k, new_v, **options)
    assert not out.isnan().any()
    assert torch.equal(k[0], model.k[0])
    assert torch.equal(k[1, :-1], model.k[1])
    assert torch.equal(k[1, -1], new_k[1, 0])
