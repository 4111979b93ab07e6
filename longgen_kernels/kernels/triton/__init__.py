"""Kernels for any Triton GPU, and for Triton's interpreter on the CPU."""

from __future__ import annotations

from torch import Tensor

from longgen_kernels.kernels.problem import AttentionProblem

def attention_unsupported(problem: AttentionProblem) -> str | None:
    return "not yet"
