"""Kernels for any Triton GPU, and for Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from longgen_kernels.cache_layout import GRANULE
from longgen_kernels.kernels.cache_problem import CacheProblem, CacheTensors, NewTokens
from longgen_kernels.kernels.problem import AttentionProblem

__all__ = [
    "attention_unsupported",
    "attn_bwd",
    "attn_fwd",
    "backward_unsupported",
    "cache_append",
    "cache_attention_unsupported",
    "cache_attn",
    "cache_unsupported",
]


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Triton kernels can run the problem, otherwise the reason."""
    reason = _unsupported(problem.q, problem.head_dim, problem.q.dtype)
    if reason is not None:
        return reason
    if problem.q_heads > 65535 or (problem.batch > 65535 and not problem.varlen):
        return f"takes up to 65535 heads and rows of a batch, got {problem.q_heads} and {problem.batch}"
    return None


backward_unsupported = attention_unsupported


def cache_unsupported(cache: CacheTensors) -> str | None:
    """None if the Triton kernels can append to the cache, otherwise the reason."""
    page = cache.page_size
    if cache.block_table is not None and (page < GRANULE or page & (page - 1)):
        return f"takes pages of a power of two of at least {GRANULE} tokens, got {page}"
    if cache.kv_heads > 65535 or cache.batch > 65535:
        return f"takes up to 65535 heads and sequences, got {cache.kv_heads} and {cache.batch}"
    return _unsupported(cache.k, cache.head_dim, cache.dtype)


def cache_attention_unsupported(problem: CacheProblem) -> str | None:
    """None if the Triton kernels can attend to the problem's cache, otherwise the reason."""
    return cache_unsupported(problem.cache)


def _unsupported(x: Tensor, head_dim: int, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if dtype == torch.float64:
        return "takes float16, bfloat16 and float32, got float64"
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes bfloat16 wrongly"
    if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
        return f"takes head_dim 8 to 256 in multiples of 8, got {head_dim}"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and LSE of a problem."""
    from longgen_kernels.kernels.triton import attention  # triton is imported when first used

    return attention.attn_fwd(problem)


def attn_bwd(
    problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from longgen_kernels.kernels.triton import attention

    return attention.attn_bwd(problem, dout, out, lse, dlse)


def cache_append(cache: CacheTensors, new: NewTokens) -> None:
    """Writes new tokens to a cache and adds them to its lengths."""
    from longgen_kernels.kernels.triton import cache as kernels

    kernels.cache_append(cache, new)


def cache_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Output and LSE of attention to a cache."""
    from longgen_kernels.kernels.triton import cache as kernels

    return kernels.cache_attn(problem)
