"""Kernels for any Triton GPU, and for Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from longgen_kernels.kernels.problem import AttentionProblem

__all__ = ["attention_unsupported", "attn_bwd", "attn_fwd", "backward_unsupported"]


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Triton kernels can run the problem, otherwise the reason."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if problem.q.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, got float64"
    if problem.q.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes bfloat16 wrongly"
    if problem.head_dim % 8 != 0 or not 8 <= problem.head_dim <= 256:
        return f"takes head_dim 8 to 256 in multiples of 8, got {problem.head_dim}"
    if problem.q_heads > 65535 or (problem.batch > 65535 and not problem.varlen):
        return f"takes up to 65535 heads and rows of a batch, got {problem.q_heads} and {problem.batch}"
    if problem.q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(problem.q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


backward_unsupported = attention_unsupported


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
