"""The public function that merges attention states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.ops import merge as _merge_ops  # defines torch.ops.longgen_kernels.merge_attn_states

__all__ = ["explain_merge", "merge_attn_states"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def merge_attn_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merges attention of the same queries to two disjoint sets of keys into attention to their union; differentiable.

        lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    Split KV, context parallelism, chunked prefill over a cache and cascades of shared prefixes all end in this.

    Args:
        out_a, out_b: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) of a packed batch, fp16, bf16, fp32
            or fp64 (reference only); any strides with a unit last one. Each row is normalised by its own keys.
        lse_a, lse_b: natural-log-sum-exp of each row's scaled scores, (batch, heads, seqlen) or (heads, total), fp32
            (fp64 with fp64 outputs); any strides. -inf is a row that saw no key: whatever its output holds, NaN
            included, is left out. +inf is a number like any other, not a mark of such a row.
        backend: "auto", "cuda", "triton" or "reference"; see `explain_merge` for what would run.

    Returns:
        (out, lse), contiguous, shaped and typed like `out_a` and `lse_a`. A row that is -inf in both has output 0, LSE
        -inf and zero gradients. The arithmetic is in fp32 (fp64 for fp64), and bitwise repeatable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and what would be valid.
        NotImplementedError: no allowed backend can run the call; the message gives each one's reason.

    Source: attention composition in FlashInfer (arXiv 2501.01005); Ring Attention (arXiv 2310.01889).

    >>> scores, values = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 8, 16)  # 5 queries, 8 keys
    >>> def attend(scores, values):
    ...     return (scores.softmax(-1) @ values).transpose(1, 2), scores.logsumexp(-1)
    >>> first, second = attend(scores[..., :3], values[:, :, :3]), attend(scores[..., 3:], values[:, :, 3:])
    >>> out, lse = merge_attn_states(*first, *second)
    >>> whole_out, whole_lse = attend(scores, values)
    >>> torch.allclose(out, whole_out, atol=1e-6), torch.allclose(lse, whole_lse, atol=1e-6)
    (True, True)
    """
    dispatch.check_backend_name(backend)
    _check(out_a, lse_a, out_b, lse_b)
    op: Any = torch.ops.longgen_kernels.merge_attn_states
    if out_a.dim() == 3:
        out, lse = op(*(x.unsqueeze(0) for x in (out_a, lse_a, out_b, lse_b)), backend)
        return out.squeeze(0), lse.squeeze(0)
    out, lse = op(out_a, lse_a, out_b, lse_b, backend)
    return out, lse


def explain_merge(out_a: Tensor) -> dict[str, str | None]:
    """For each backend None, where it can merge states like `out_a`, or the reason why it cannot. Nothing runs.

    >>> explain_merge(torch.empty(1, 4, 2, 64))["reference"] is None
    True
    """
    return dispatch.explain(_merge_ops.SUPPORT, out_a, "merge_attn_states", out_a.device.type)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    for name, tensor in {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != out_a.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on out_a's device, {out_a.device}")
    if out_a.dtype not in _DTYPES:
        raise TypeError(f"out_a is {out_a.dtype}; valid are float16, bfloat16, float32 and float64")
    if out_a.dim() not in (3, 4) or out_a.shape[-1] == 0:
        raise ValueError(
            f"out_a has shape {tuple(out_a.shape)}; valid are (batch, seqlen, heads, head_dim) and "
            "(total, heads, head_dim), head_dim at least 1"
        )
    if out_b.dtype != out_a.dtype:
        raise TypeError(f"out_b is {out_b.dtype}; it must be out_a's {out_a.dtype}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b has shape {tuple(out_b.shape)}; it must be out_a's, {tuple(out_a.shape)}")
    for name, out in {"out_a": out_a, "out_b": out_b}.items():
        if out.shape[-1] != 1 and out.stride(-1) != 1:
            raise ValueError(f"{name} has strides {out.stride()}; the last one must be 1 (call .contiguous())")

    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    *lead, seqlen, heads, _ = out_a.shape
    lse_shape = (*lead, heads, seqlen)
    for name, lse in {"lse_a": lse_a, "lse_b": lse_b}.items():
        if lse.dtype != lse_dtype:
            raise TypeError(f"{name} is {lse.dtype}; with outputs of {out_a.dtype} it must be {lse_dtype}")
        if lse.shape != lse_shape:
            raise ValueError(
                f"{name} has shape {tuple(lse.shape)}; with out_a of shape {tuple(out_a.shape)} it must be {lse_shape}"
            )
