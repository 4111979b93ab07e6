"""Patterns back from plain dicts (model configs) and from operator arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.patterns.arithmetic import AttentionPattern
from longgen_kernels.patterns.block_mask import BlockMask


def pattern_from_dict(data: dict[str, Any]) -> AttentionPattern | BlockMask:
    """The pattern that `to_dict` described.

    >>> pattern_from_dict({"kind": "arithmetic", "sink": 4, "window": 64}).kept_tokens(1000)
    68
    """
    if not isinstance(data, dict):
        raise TypeError(f"pattern_from_dict: expected a dict, got {type(data).__name__}")
    fields = dict(data)
    kind = fields.pop("kind", None)
    try:
        if kind == "arithmetic":
            return AttentionPattern(**fields)
        if kind == "block_mask":
            for name in ("indptr", "indices"):
                fields[name] = torch.tensor(fields[name], dtype=torch.long)
            return BlockMask.from_csr(**fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"pattern_from_dict: fields do not fit kind {kind!r}: {data!r} ({error})") from error
    raise ValueError(f"pattern_from_dict: kind must be 'arithmetic' or 'block_mask', got {kind!r}")


def decode_pattern(
    code: Sequence[int], rows: Tensor | None = None, cols: Tensor | None = None
) -> AttentionPattern | BlockMask:
    """The pattern behind an operator's `encode()`d arguments."""
    if code[0] == 0:
        return _decode_arithmetic(tuple(code))
    assert rows is not None and cols is not None
    _, is_causal, heads, q_blocks, k_blocks, block_size = code[:6]
    return BlockMask(rows, cols, heads, q_blocks, k_blocks, block_size, bool(is_causal))


@lru_cache(maxsize=256)
def _decode_arithmetic(code: tuple[int, ...]) -> AttentionPattern:
    _, causal, sink, window, window_blocks, stride, block_size, step, offset = code
    return AttentionPattern(
        is_causal=bool(causal),
        sink=sink,
        window=None if window < 0 else window,
        window_blocks=None if window_blocks < 0 else window_blocks,
        stride=stride or None,
        block_size=block_size or None,
        head_phase_step=step,
        head_phase_offset=offset,
    )
