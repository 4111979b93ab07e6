"""How many bytes the two ways of exchanging take, counted from what they send."""

from __future__ import annotations

import torch

from longgen_kernels import AttentionPattern
from model_integration.context_parallel.heads import head_ranges, head_rows, output_rows
from model_integration.context_parallel.needs import needs_of
from model_integration.context_parallel.sharding import Sharding


def busiest_rank(sent: list[list[int]]) -> int:
    """The most that any rank sends or receives; `sent[a][b]` goes from rank a to rank b, and to itself for nothing.

    >>> busiest_rank([[9, 1, 2], [0, 9, 3], [0, 0, 9]])
    5
    """
    ranks = range(len(sent))
    out = [sum(sent[a][b] for b in ranks if b != a) for a in ranks]
    into = [sum(sent[a][b] for a in ranks if a != b) for b in ranks]
    return max(*out, *into)


def bytes_by_heads(sharding: Sharding, heads: int, kv_heads: int, vector_bytes: int) -> int:
    """Bytes of the busiest rank in one layer's forward pass by heads: q, k and v there, the output back.

    Args:
        vector_bytes: bytes of one head of one token: head_dim times the element's size.
    """
    ranges = head_ranges(heads, kv_heads, sharding.ranks)
    sent = []
    for rank in range(sharding.ranks):
        there, back = head_rows(sharding, ranges, rank)[0], output_rows(sharding, ranges, rank)[0]
        sent.append([a + b for a, b in zip(there, back, strict=True)])
    return busiest_rank(sent) * vector_bytes


def bytes_by_keys(
    sharding: Sharding,
    pattern: AttentionPattern,
    kv_heads: int,
    vector_bytes: int,
    device: torch.device | None = None,
) -> int:
    """Bytes of the busiest rank in one layer's forward pass by keys: the keys and values that others see."""
    ranks = range(sharding.ranks)
    needed = [needs_of(sharding, pattern, kv_heads, to, device).rows_from(sharding.ranks) for to in ranks]
    return busiest_rank([[2 * needed[to][source] for to in ranks] for source in ranks]) * vector_bytes
