"""The named, frozen cases that every figure refers to, and what is counted as useful work in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longgen_kernels import AttentionPattern

PATTERNS: Mapping[str, AttentionPattern] = MappingProxyType(
    {
        "sink_window": AttentionPattern.sink_window(sink=128, window=2048),
        "sink_window_blocks": AttentionPattern.sink_window(sink=128, window_blocks=16, block_size=128),
        "strided": AttentionPattern.strided(16, 64, window=1024),
        "strided_128": AttentionPattern.strided(16, 128, window=2048),
        "window": AttentionPattern.sink_window(sink=0, window=2048),  # what flash-attn can express, too
        "causal": AttentionPattern.causal(),
    }
)

# Differences from the default shape: bf16, batch 1, 32 query heads and KV heads of 128.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mha": {},
        "gqa": {"kv_heads": 8},
        "d64": {"head_dim": 64},
        "batch8": {"batch": 8},
        "tiny": {"q_heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32},  # for machines without a GPU
    }
)

LENGTHS = (8192, 16384, 32768, 131072)
PASSES = ("fwd", "bwd")
_UNITS = {"K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Case:
    """One attention problem of a benchmark: self-attention of `batch` sequences of `seqlen` tokens."""

    name: str
    pattern: AttentionPattern
    seqlen: int
    variant: str = "mha"
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        """The case in one word, such as "strided/16K/gqa"."""
        return f"{self.name}/{length_name(self.seqlen)}/{self.variant}"

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q_heads // self.kv_heads

    def at(self, seqlen: int) -> Case:
        """The same case at another length."""
        return replace(self, seqlen=seqlen)

    def dense(self) -> Case:
        """Dense causal attention of the same shape: what peers without sparsity are measured on."""
        return replace(self, name="causal", pattern=PATTERNS["causal"])

    def flops(self, which: str) -> float:
        """Useful floating-point operations of a pass: "fwd" is 2 matmuls over the visible pairs, "bwd" 5."""
        return {"fwd": 1.0, "bwd": 2.5}[which] * forward_flops(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "pattern": self.pattern.to_dict(),
            "seqlen": self.seqlen,
            "variant": self.variant,
            "batch": self.batch,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@functools.cache
def forward_flops(case: Case) -> int:
    """4 * head_dim floating-point operations for each visible (query, key) pair of each query head."""
    pairs = case.pattern.visible_pairs(case.seqlen, heads=case.kv_heads)
    return 4 * case.head_dim * case.group * case.batch * pairs


def make_cases(names: Iterable[str], lengths: Iterable[int], variants: Iterable[str] = ("mha",)) -> list[Case]:
    """Every combination, shortest first, so that a kernel is checked on a short sequence before a long one is timed.

    Raises KeyError for a name or variant that does not exist.
    """
    named = [(name, PATTERNS[name]) for name in names]
    shapes = [(variant, VARIANTS[variant]) for variant in variants]
    return [
        Case(name, pattern, seqlen, variant, **shape)
        for seqlen in sorted(set(lengths))
        for name, pattern in named
        for variant, shape in shapes
    ]


def parse_length(text: str) -> int:
    """Tokens from "16384", "16K" or "1M"; raises ValueError otherwise.

    >>> parse_length("16K")
    16384
    """
    unit = _UNITS.get(text[-1:].upper())
    length = int(text[:-1]) * unit if unit else int(text)
    if length < 1:
        raise ValueError(f"a length must be at least 1, got {text}")
    return length


def length_name(seqlen: int) -> str:
    """The inverse of `parse_length`.

    >>> length_name(131072), length_name(2304)
    ('128K', '2304')
    """
    for unit, size in reversed(_UNITS.items()):
        if seqlen % size == 0:
            return f"{seqlen // size}{unit}"
    return str(seqlen)


@dataclass(frozen=True)
class Inputs:
    """Random q and dout (batch, seqlen, q_heads, head_dim), k and v (batch, seqlen, kv_heads, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed inputs: zeros would run faster than real data does."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (case.batch, case.seqlen, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    return Inputs(normal(case.q_heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.q_heads))
