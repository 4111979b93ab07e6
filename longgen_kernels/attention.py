"""The public attention functions."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.kernels.problem import (
    AttentionProblem,
    check_cu_seqlens,
    check_pages,
    check_pattern,
    check_qkv,
    checked_scale,
)
from longgen_kernels.ops import attention as attention_ops
from longgen_kernels.patterns import AttentionPattern, BlockMask

Pattern = AttentionPattern | BlockMask


@overload
def longgen_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    backend: str = "auto",
    q_start: int | None = None,
    k_start: int = 0,
) -> Tensor: ...
@overload
def longgen_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    backend: str = "auto",
    q_start: int | None = None,
    k_start: int = 0,
) -> tuple[Tensor, Tensor]: ...
def longgen_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    q_start: int | None = None,
    k_start: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the (query, key) pairs that `pattern` makes visible; differentiable.

    Args:
        q: (batch, seqlen_q, q_heads, head_dim), fp16, bf16, fp32 or fp64; any strides with a unit last one.
        k, v: (batch, seqlen_k, kv_heads, head_dim); `q_heads` is a multiple of `kv_heads` (GQA, MQA).
        pattern: what is visible, in absolute positions.
        softmax_scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the natural-log-sum-exp of each row's scaled scores; its gradient is supported.
        deterministic: make the backward pass bitwise repeatable; so does `torch.use_deterministic_algorithms(True)`.
        backend: "auto", "cuda", "triton" or "reference"; see `explain_attention` for what would run.
        q_start: position of query row 0; by default `k_start + seqlen_k - seqlen_q` (suffix alignment).
        k_start: position of key row 0.

    Returns:
        The output, shaped like q and contiguous, and with `return_lse` the LSE, fp32 (batch, q_heads, seqlen_q). A row
        that sees no key has output 0, LSE -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what would be valid.
        NotImplementedError: no allowed backend can run the call; the message gives each one's reason.

    Source: LongGen (arXiv 2410.01485); tiling and recomputation as in FlashAttention-2 (arXiv 2307.08691).

    >>> q, k, v = (torch.randn(1, 256, heads, 64) for heads in (4, 2, 2))
    >>> out = longgen_attn_func(q, k, v, AttentionPattern.sink_window(sink=4, window=64))
    >>> out.shape
    torch.Size([1, 256, 4, 64])
    """
    check_qkv(q, k, v, varlen=False)
    k_start = _checked_start("k_start", k_start, low=0)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if q_start is None:
        q_start = k_start + seqlen_k - seqlen_q
    else:
        q_start = _checked_start("q_start", q_start, low=0)
    check_pattern(pattern, q, q_start + seqlen_q, k_start + seqlen_k)
    out, lse = _call(
        q, k, v, pattern, softmax_scale, q_start, k_start, None, None, None, None, deterministic, backend
    )  # fmt: skip
    return (out, lse) if return_lse else out


@overload
def longgen_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    deterministic: bool = False,
    backend: str = "auto",
    q_start: Tensor | None = None,
    k_start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor: ...
@overload
def longgen_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    return_lse: Literal[True],
    deterministic: bool = False,
    backend: str = "auto",
    q_start: Tensor | None = None,
    k_start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def longgen_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    q_start: Tensor | None = None,
    k_start: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`longgen_attn_func` over a packed batch of sequences of different lengths.

    Args:
        q: (total_q, q_heads, head_dim); sequence `b` is the rows `cu_seqlens_q[b]:cu_seqlens_q[b + 1]`.
        k, v: (total_k, kv_heads, head_dim), likewise by `cu_seqlens_k`.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), from 0, never decreasing. Lengths of 0 are allowed. The values
            stay on the device.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, in tokens. The kernels take the lengths from
            `cu_seqlens`; the bounds only serve to check a block mask's extent.
        q_start, k_start: int32 (batch,) positions of each sequence's first query and key row; by default keys start
            at 0 and queries are aligned to the end of the keys.
        block_table: int32 (batch, table_pages), for keys in pages as serving engines keep them: k and v then are
            (pages, page_size, kv_heads, head_dim), and key `r` of sequence `b` is row `r % page_size` of page
            `block_table[b, r // page_size]`. `cu_seqlens_k` says how many keys there are; entries of pages behind them
            are not read. No gradient, no `k_start`. The Hopper kernel reads pages of 16 tokens and more, a power of
            two, in place; other backends copy them into a packed batch first.

    The other arguments, the errors and the source are those of `longgen_attn_func`; the LSE is fp32 (q_heads, total_q).
    Rows past `cu_seqlens_q[-1]` get output 0, LSE -inf and zero gradients.

    >>> q, k, v = (torch.randn(300, 4, 64) for _ in range(3))
    >>> cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32)
    >>> pattern = AttentionPattern.sink_window(sink=4, window=64)
    >>> longgen_attn_varlen_func(q, k, v, pattern, cu_seqlens, cu_seqlens, 200, 200).shape
    torch.Size([300, 4, 64])
    """
    if block_table is None:
        check_qkv(q, k, v, varlen=True)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {cu_seqlens_q.numel()} and {cu_seqlens_k.numel()}"
        )
    if block_table is not None:
        check_pages(q, k, v, block_table, cu_seqlens_q.numel() - 1)
        if k_start is not None:
            raise ValueError("k_start must be None with a block_table: the first page holds position 0")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise NotImplementedError("attention with a block_table has no gradient: call it under torch.no_grad()")
    max_seqlen_q = _checked_start("max_seqlen_q", max_seqlen_q, low=0)
    max_seqlen_k = _checked_start("max_seqlen_k", max_seqlen_k, low=0)
    for name, starts in (("q_start", q_start), ("k_start", k_start)):
        if starts is None:
            continue
        if not isinstance(starts, Tensor) or starts.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor (batch,) or None, got {starts!r}")
        if starts.shape != (cu_seqlens_q.numel() - 1,) or starts.device != q.device or not starts.is_contiguous():
            raise ValueError(f"{name} must be contiguous (batch,) on {q.device}, got {starts.shape} on {starts.device}")
    # Without offsets the last query stands on the last key, so that no position reaches max_seqlen_k.
    check_pattern(pattern, q, max(max_seqlen_q, max_seqlen_k) if q_start is not None else max_seqlen_k, max_seqlen_k)
    out, lse = _call(
        q, k, v, pattern, softmax_scale, 0, 0, cu_seqlens_q, cu_seqlens_k, q_start, k_start, deterministic, backend,
        block_table,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def explain_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> dict[str, str | None]:
    """For each backend None, where it can run `longgen_attn_func(q, k, v, pattern)`, or the reason why it cannot.

    Nothing runs. The first backend with None in the order cuda, triton (tensors on a GPU) or reference (on the CPU) is
    what `backend="auto"` takes.

    >>> q = torch.empty(1, 64, 2, 64)
    >>> explain_attention(q, q, q, AttentionPattern.causal())["reference"] is None
    True
    """
    check_qkv(q, k, v, varlen=False)
    check_pattern(pattern, q, max(q.shape[1], k.shape[1]), k.shape[1])
    problem = AttentionProblem(q, k, v, pattern, checked_scale(None, q.shape[-1]))
    return dispatch.explain(attention_ops.SUPPORT, problem, "attention", q.device.type)


def _checked_start(name: str, value: int, *, low: int) -> int:
    if isinstance(value, bool | float | Tensor):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    softmax_scale: float | None,
    q_start: int,
    k_start: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    deterministic: bool,
    backend: str,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dispatch.check_backend_name(backend)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool, got {deterministic!r}")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    scale = checked_scale(softmax_scale, q.shape[-1])
    problem = AttentionProblem(
        q, k, v, pattern, scale, q_start, k_start, cu_seqlens_q, cu_seqlens_k, q_starts, k_starts, deterministic,
        block_table,
    )  # fmt: skip
    return attention_ops.attend(problem, backend)
