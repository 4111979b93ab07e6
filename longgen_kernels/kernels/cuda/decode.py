"""Launches the kernels of csrc/decode."""

from __future__ import annotations

from torch import Tensor

from longgen_kernels.kernels.cache_problem import CacheProblem, CacheTensors, NewTokens


def cache_unsupported(cache: CacheTensors) -> str | None:
    """None if the kernels can append to the cache, otherwise the reason."""
    return "has no kernel yet"


def cache_attention_unsupported(problem: CacheProblem) -> str | None:
    """None if the kernels can attend to the problem's cache, otherwise the reason."""
    return "has no kernel yet"


def cache_append(cache: CacheTensors, new: NewTokens) -> None:
    raise NotImplementedError


def cache_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
