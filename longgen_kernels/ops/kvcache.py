"""The operators `torch.ops.longgen_kernels.kvcache_attn`, `kvcache_append` and `kvcache_append_attn`.

The first is functional, the others declare that they write to the cache. A cache travels as its tensors, the ints of
its pattern and the size of its ring (-1: each token's slot is its position), an fp8 one with its scales. The backend is
chosen when one runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.kernels import cuda, reference, triton
from longgen_kernels.kernels.cache_problem import CacheProblem, CacheTensors, NewTokens
from longgen_kernels.ops.eager import is_plain_eager
from longgen_kernels.patterns import AttentionPattern, decode_pattern

BACKENDS = {"cuda": cuda, "triton": triton, "reference": reference}
SUPPORT = {name: backend.cache_attention_unsupported for name, backend in BACKENDS.items()}
APPEND_SUPPORT = {name: backend.cache_unsupported for name, backend in BACKENDS.items()}

lib = torch.library.Library("longgen_kernels", "FRAGMENT")

# The tickets are the kernels' counters: nobody else sees that they are written to.
_LAYOUT = "Tensor? tickets, Tensor? block_table, int[] pattern, int ring"
_WRITTEN = f"Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) seqlens, {_LAYOUT}"
_NEW = "Tensor k, Tensor v, Tensor? counts, bool advance"
_REST = "str backend, Tensor? k_scale=None, Tensor? v_scale=None"
_HINT = "bool equal_lengths=False"
lib.define(
    f"kvcache_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, {_LAYOUT}, "
    f"float softmax_scale, SymInt q_offset, {_REST}, {_HINT}) -> (Tensor, Tensor)"
)
lib.define(f"kvcache_append({_WRITTEN}, {_NEW}, {_REST}) -> ()")
lib.define(
    f"kvcache_append_attn(Tensor q, {_WRITTEN}, {_NEW}, float softmax_scale, {_REST}, {_HINT}) -> (Tensor, Tensor)"
)


def runs_in_one_pass(problem: CacheProblem, backend: str) -> bool:
    """Whether a chunk is best appended first, so that it finds all of its keys in the cache.

    Only a cache that keeps everything allows it, which the CUDA backend knows, and only that backend gains by it: the
    others attend to the chunk itself faster than to the cache. While something traces, no backend can be asked: which
    one runs is known later.
    """
    q, cache, new = problem.q, problem.cache, problem.new
    plain = is_plain_eager(q, cache.k, *((new.k, new.v) if new else ()))
    return plain and _choose(problem, backend) == "cuda"


def attend(problem: CacheProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Runs a checked problem through its operator, or without it where nobody could tell. No gradients."""
    q, cache, new = problem.q, problem.cache, problem.new
    if is_plain_eager(q, cache.k, *((new.k, new.v) if new else ())):
        return _run(problem, backend)
    ring = cache.layout.ring
    arguments = (
        q, cache.k, cache.v, cache.seqlens, cache.tickets, cache.block_table, cache.layout.pattern.encode(),
        -1 if ring is None else ring,
    )  # fmt: skip
    rest = (backend, cache.k_scale, cache.v_scale, cache.equal_lengths)
    if new is None:
        out, lse = torch.ops.longgen_kernels.kvcache_attn.default(
            *arguments, problem.softmax_scale, problem.q_offset, *rest
        )
    else:
        out, lse = torch.ops.longgen_kernels.kvcache_append_attn.default(
            *arguments, new.k, new.v, new.counts, new.advance, problem.softmax_scale, *rest
        )
    return out, lse


def _cache(
    k: Tensor, v: Tensor, seqlens: Tensor, tickets: Tensor | None, table: Tensor | None, code: list[int], ring: int,
    k_scale: Tensor | None, v_scale: Tensor | None, dtype: torch.dtype, equal_lengths: bool = False,
) -> CacheTensors:  # fmt: skip
    pattern = decode_pattern(code)
    assert isinstance(pattern, AttentionPattern)
    layout = CacheLayout(pattern, None if ring < 0 else ring)
    return CacheTensors(k, v, seqlens, layout, table, tickets, k_scale, v_scale, dtype, equal_lengths)


def _choose(problem: CacheProblem, backend: str) -> str:
    last = ("cuda",) if cuda.leaves_gpu_idle(problem) else ()
    return dispatch.choose(backend, SUPPORT, problem, "attention to a KV cache", problem.q.device.type, last)


def _run(problem: CacheProblem, backend: str) -> tuple[Tensor, Tensor]:
    chosen = _choose(problem, backend)
    if problem.q.numel() == 0:
        if problem.new is not None:
            BACKENDS[chosen].cache_append(problem.cache, problem.new)
        return _results_fake(problem.q)
    out, lse = BACKENDS[chosen].cache_attn(problem)
    return out, lse


def _attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, tickets: Tensor | None, table: Tensor | None,
    pattern: list[int], ring: int, softmax_scale: float, q_offset: int, backend: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cache = _cache(
        k_cache, v_cache, seqlens, tickets, table, pattern, ring, k_scale, v_scale, q.dtype,
        equal_lengths,
    )  # fmt: skip
    return _run(CacheProblem(q, cache, softmax_scale, q_offset), backend)


def _append(
    k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, tickets: Tensor | None, table: Tensor | None,
    pattern: list[int], ring: int, k: Tensor, v: Tensor, counts: Tensor | None, advance: bool, backend: str,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    cache = _cache(k_cache, v_cache, seqlens, tickets, table, pattern, ring, k_scale, v_scale, k.dtype)
    chosen = dispatch.choose(backend, APPEND_SUPPORT, cache, "appending to a KV cache", k.device.type)
    BACKENDS[chosen].cache_append(cache, NewTokens(k, v, counts, advance))


def _append_attn(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, tickets: Tensor | None, table: Tensor | None,
    pattern: list[int], ring: int, k: Tensor, v: Tensor, counts: Tensor | None, advance: bool, softmax_scale: float,
    backend: str, k_scale: Tensor | None = None, v_scale: Tensor | None = None, equal_lengths: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cache = _cache(
        k_cache, v_cache, seqlens, tickets, table, pattern, ring, k_scale, v_scale, q.dtype,
        equal_lengths,
    )  # fmt: skip
    return _run(CacheProblem(q, cache, softmax_scale, 0, NewTokens(k, v, counts, advance)), backend)


def _results_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, n, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((batch, heads, n), dtype=dtype)


for _name, _impl, _fake in (
    ("kvcache_attn", _attn, _results_fake),
    ("kvcache_append", _append, lambda *_: None),
    ("kvcache_append_attn", _append_attn, _results_fake),
):
    for _key in ("CPU", "CUDA"):
        lib.impl(_name, _impl, _key)
    torch.library.register_fake(f"longgen_kernels::{_name}", _fake, lib=lib)
