"""The public function that attends to a KV cache."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.cache_layout import MAX_QUERY_TOKENS, CacheLayout
from longgen_kernels.cache_scales import FP8
from longgen_kernels.kernels.cache_problem import (
    CacheProblem,
    CacheTensors,
    NewTokens,
    check_cache,
    check_new_tokens,
    check_queries,
)
from longgen_kernels.kernels.problem import checked_scale
from longgen_kernels.kv_cache import KVCache
from longgen_kernels.ops import attention as _attention_ops  # noqa: F401  defines torch.ops.longgen_kernels.attn_fwd
from longgen_kernels.ops import kvcache as kvcache_ops
from longgen_kernels.ops import merge as _merge_ops  # noqa: F401  defines merge_attn_states
from longgen_kernels.patterns import AttentionPattern

__all__ = ["explain_kvcache_attention", "longgen_attn_with_kvcache"]


@overload
def longgen_attn_with_kvcache(
    q: Tensor,
    cache: KVCache | tuple[Tensor, Tensor],
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    pattern: AttentionPattern | None = None,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def longgen_attn_with_kvcache(
    q: Tensor,
    cache: KVCache | tuple[Tensor, Tensor],
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    pattern: AttentionPattern | None = None,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def longgen_attn_with_kvcache(
    q: Tensor,
    cache: KVCache | tuple[Tensor, Tensor],
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    pattern: AttentionPattern | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to a cache, if they are given, and attends to what the cache then holds; no gradients.

    The result is what `longgen_attn_func` would give the same tokens over everything that the sequence ever saw.
    Nothing waits for the device, and a CUDA graph replays rightly while the cache grows.

    Args:
        q: (batch, n, q_heads, head_dim): queries of the new tokens; without k and v, of the last n tokens in the
            cache. 1 to 16 are one step of decoding or of speculative decoding; more are a chunk of a prompt. Any
            strides with a unit last one.
        cache: a `SparseKVCache` or `PagedKVCache`, which knows its pattern and lengths. Or two tensors (k, v), of
            (batch, seqlen, kv_heads, head_dim) or, with `block_table`, pages (pages, page_size, kv_heads, head_dim),
            where each token's place is its position; `q_heads` is a multiple of `kv_heads`.
        k, v: (batch, n, kv_heads, head_dim), keys after RoPE. They are written to the cache.
        counts: int32 (batch,) on the device: only the first `counts[b]` of the n tokens are sequence `b`'s, and what
            comes out for the others has no meaning. None: all n.
        cache_seqlens: with a pair of tensors, int32 (batch,): tokens in the cache before the call. It is not changed.
        block_table: with a pair of tensors, int32 (batch, pages a sequence): token `j` is row `j % page_size` of page
            `block_table[b, j // page_size]`.
        pattern: with a pair of tensors, what is visible; dense causal by default.
        softmax_scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the natural-log-sum-exp of each row's scaled scores.
        backend: "auto", "cuda", "triton" or "reference"; see `explain_kvcache_attention` for what would run.

    Returns:
        The output, shaped like q and contiguous, and with `return_lse` the LSE, fp32 (batch, q_heads, n). A row that
        sees no key has output 0 and LSE -inf.

    Raises:
        TypeError, ValueError: an argument does not fit, the sequences would pass the cache's `max_seqlen`, or the
            queries may need keys that it has overwritten; the message says which.
        NotImplementedError: no allowed backend can run the call; the message gives each one's reason.

    Source: split KV as in Flash-Decoding (Dao et al., 2023); paged caches as in vLLM (arXiv 2309.06180).

    >>> from longgen_kernels import SparseKVCache
    >>> pattern = AttentionPattern.sink_window(sink=4, window=64)
    >>> cache = SparseKVCache(pattern, batch=1, kv_heads=2, head_dim=64, max_seqlen=4096, dtype=torch.float32)
    >>> for n in (300, 1, 1):  # a prompt, and two steps
    ...     q, k, v = (torch.randn(1, n, heads, 64) for heads in (4, 2, 2))
    ...     out = longgen_attn_with_kvcache(q, cache, k, v)
    >>> out.shape, cache.seqlens.tolist()
    (torch.Size([1, 1, 4, 64]), [302])
    """
    dispatch.check_backend_name(backend)
    tensors = _tensors(cache, cache_seqlens, block_table, pattern)
    check_queries(tensors, q)
    if (k is None) != (v is None) or (k is None and counts is not None):
        raise ValueError("k and v must be given together, and counts only with them")
    n = q.shape[1]
    if k is not None and v is not None:
        check_new_tokens(tensors, k, v, counts)
        if k.shape[1] != n:
            raise ValueError(f"q and k must have one number of tokens, got {n} and {k.shape[1]}")
    scale = checked_scale(softmax_scale, q.shape[-1])
    with torch.no_grad():
        if k is None or v is None:
            if isinstance(cache, KVCache):
                cache.check_still_kept(n)
            out, lse = kvcache_ops.attend(CacheProblem(q, tensors, scale, -n), backend)
        elif not isinstance(cache, KVCache):
            problem = CacheProblem(q, tensors, scale, 0, NewTokens(k, v, counts, advance=False))
            out, lse = kvcache_ops.attend(problem, backend)
        else:
            cache.reserve(n)
            tensors = cache.tensors  # it may have grown
            problem = CacheProblem(q, tensors, scale, 0, NewTokens(k, v, counts))
            if n <= MAX_QUERY_TOKENS or (not cache.is_empty and kvcache_ops.runs_in_one_pass(problem, backend)):
                out, lse = kvcache_ops.attend(problem, backend)
                cache.advanced(n, None if counts is None else 0)
            else:
                out, lse = _attend_to_chunk(q, k, v, tensors, scale, backend)
                if not cache.is_empty:
                    cached = kvcache_ops.attend(CacheProblem(q, tensors, scale), backend)
                    out, lse = torch.ops.longgen_kernels.merge_attn_states(out, lse, *cached, backend)
                cache.append(k, v, counts, backend=backend)
    return (out, lse) if return_lse else out


def explain_kvcache_attention(
    q: Tensor,
    cache: KVCache | tuple[Tensor, Tensor],
    *,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    pattern: AttentionPattern | None = None,
) -> dict[str, str | None]:
    """For each backend None, where it can attend with q to the cache, or the reason why it cannot. Nothing runs.

    `backend="auto"` takes the first with None in the order cuda, triton (on a GPU) or reference (on the CPU). A chunk
    of more than 16 queries, but too few to occupy half of a GPU in tiles of 128, asks triton before cuda.

    >>> cache = torch.empty(1, 128, 2, 64), torch.empty(1, 128, 2, 64)
    >>> lengths = torch.tensor([100], dtype=torch.int32)
    >>> explain_kvcache_attention(torch.empty(1, 1, 4, 64), cache, cache_seqlens=lengths)["reference"] is None
    True
    """
    tensors = _tensors(cache, cache_seqlens, block_table, pattern)
    check_queries(tensors, q)
    problem = CacheProblem(q, tensors, checked_scale(None, q.shape[-1]), -q.shape[1])
    return dispatch.explain(kvcache_ops.SUPPORT, problem, "attention to a KV cache", q.device.type)


def _tensors(
    cache: KVCache | tuple[Tensor, Tensor],
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    pattern: AttentionPattern | None,
) -> CacheTensors:
    if isinstance(cache, KVCache):
        if cache_seqlens is not None or block_table is not None or pattern is not None:
            raise ValueError(f"cache_seqlens, block_table and pattern are the {type(cache).__name__}'s own: leave out")
        return cache.tensors
    if not isinstance(cache, tuple) or len(cache) != 2:
        raise TypeError(f"cache must be a KV cache or a pair of tensors (k, v), got {type(cache).__name__}")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with a cache that is a pair of tensors")
    pattern = AttentionPattern.causal() if pattern is None else pattern
    if not isinstance(pattern, AttentionPattern) or not pattern.is_causal:
        raise NotImplementedError(f"attention to a cache takes causal AttentionPatterns, got {pattern!r}")
    for name, x in (("k_cache", cache[0]), ("v_cache", cache[1])):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise TypeError(f"{name} must be a tensor (batch or pages, slots, kv_heads, head_dim), got {_described(x)}")
        if x.dtype == FP8:
            raise NotImplementedError(
                f"{name} is {x.dtype}, but a pair of tensors has no scales: make a SparseKVCache, or a PagePool, with "
                "cache_dtype=torch.float8_e4m3fn"
            )
    k, v = (x.transpose(1, 2) for x in cache)
    tensors = CacheTensors(k, v, cache_seqlens, CacheLayout(pattern), block_table)
    check_cache(tensors)
    return tensors


def _described(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _attend_to_chunk(
    q: Tensor, k: Tensor, v: Tensor, cache: CacheTensors, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk's rows to the chunk itself, as a packed batch: that takes positions from the device."""
    batch, n = q.shape[:2]
    bounds = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device)
    out, lse = torch.ops.longgen_kernels.attn_fwd(
        *(x.flatten(0, 1) for x in (q, k, v)), cache.layout.pattern.encode(), None, None, scale, 0, 0,
        bounds, bounds, cache.seqlens, cache.seqlens, False, backend,
    )  # fmt: skip
    return out.unflatten(0, (batch, n)), lse.unflatten(1, (batch, n)).transpose(0, 1)
