"""Ulysses: every rank gets the whole sequence for some of the heads, attends, and gives the output back.

Any attention can run in the middle, and causal work is even, since every rank has every position. KV heads are sent to
each rank whose query heads read them, so that they may be fewer than the ranks, or not divide by them; the gradients of
a head that several ranks have used are summed at its owner.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from longgen_kernels import AttentionPattern, longgen_attn_func, longgen_attn_varlen_func
from model_integration.context_parallel.exchange import exchange_rows
from model_integration.context_parallel.sharding import Sharding


@dataclass(frozen=True)
class HeadRange:
    """The query heads [q_start, q_stop) of one rank, and the KV heads [kv_start, kv_stop) that they read."""

    q_start: int
    q_stop: int
    group: int

    @property
    def kv_start(self) -> int:
        return self.q_start // self.group

    @property
    def kv_stop(self) -> int:
        return -(-self.q_stop // self.group)

    @property
    def q_heads(self) -> int:
        return self.q_stop - self.q_start

    @property
    def kv_heads(self) -> int:
        return self.kv_stop - self.kv_start

    def runs(self) -> Iterator[HeadRange]:
        """Parts whose query heads divide evenly over their KV heads: whole groups, and a cut group at either end.

        >>> [(run.q_start, run.q_stop) for run in HeadRange(3, 11, group=4).runs()]
        [(3, 4), (4, 8), (8, 11)]
        """
        first, last = -(-self.q_start // self.group) * self.group, self.q_stop // self.group * self.group
        if first > last:  # all within one group
            first = last = self.q_stop
        for start, stop in ((self.q_start, first), (first, last), (last, self.q_stop)):
            if start < stop:
                yield HeadRange(start, stop, self.group)


def head_ranges(heads: int, kv_heads: int, ranks: int) -> list[HeadRange]:
    """The heads of each rank; ValueError when there are fewer query heads than ranks.

    >>> [(r.q_heads, r.kv_heads) for r in head_ranges(heads=6, kv_heads=3, ranks=4)]
    [(1, 1), (2, 2), (1, 1), (2, 1)]
    """
    if heads < ranks:
        raise ValueError(f"{heads} query heads cannot be divided among {ranks} ranks; use at most {heads}")
    bounds = [heads * rank // ranks for rank in range(ranks + 1)]
    return [HeadRange(start, stop, heads // kv_heads) for start, stop in pairwise(bounds)]


def attend_by_heads(
    sharding: Sharding,
    rank: int,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    scale: float | None,
) -> Tensor:
    """Attention of a rank's queries (batch, tokens, heads, head_dim) to the whole sequence, by exchanging heads.

    k, v: (batch, tokens, kv_heads, head_dim). Returns the output, like q.
    """
    batch, head_dim = sharding.batch, q.shape[-1]
    ranges = head_ranges(q.shape[2], k.shape[2], sharding.ranks)
    own = ranges[rank]
    # Tokens before rows: what arrives from the ranks in turn is then the sequence in order.
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    parts = [
        torch.cat(
            [q[:, :, r.q_start : r.q_stop], k[:, :, r.kv_start : r.kv_stop], v[:, :, r.kv_start : r.kv_stop]], dim=2
        )
        for r in ranges
    ]
    send, receive = head_rows(sharding, ranges, rank)
    received = exchange_rows(torch.cat([p.flatten(0, 2) for p in parts]), send, receive, group)
    widths = (own.q_heads, own.kv_heads, own.kv_heads)
    whole = received.view(sharding.length, batch, sum(widths), head_dim).transpose(0, 1)
    q, k, v = whole.split(widths, dim=2)
    out = _attend(sharding, own, q, k, v, pattern, scale).transpose(0, 1)

    send, receive = output_rows(sharding, ranges, rank)
    returned = exchange_rows(out.flatten(0, 2), send, receive, group)
    tokens = sharding.tokens(rank)
    by_rank = [part.view(tokens, batch, -1, head_dim) for part in returned.split(receive)]
    return torch.cat(by_rank, dim=2).transpose(0, 1)


def _attend(
    sharding: Sharding, own: HeadRange, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, scale: float | None
) -> Tensor:
    """Attention over whole sequences (batch, length, heads, head_dim) of the heads in `own`."""
    documents = torch.tensor(sharding.documents, dtype=torch.int32, device=q.device)
    longest = max(stop - start for start, stop in pairwise(sharding.documents))
    outputs = []
    for run in own.runs():
        q_run = q[:, :, run.q_start - own.q_start : run.q_stop - own.q_start]
        k_run, v_run = (x[:, :, run.kv_start - own.kv_start : run.kv_stop - own.kv_start] for x in (k, v))
        seen = pattern.shard_heads(run.kv_start)
        if sharding.is_plain:
            outputs.append(longgen_attn_func(q_run, k_run, v_run, seen, softmax_scale=scale))
            continue
        q_run, k_run, v_run = (x.flatten(0, 1) for x in (q_run, k_run, v_run))
        out = longgen_attn_varlen_func(
            q_run, k_run, v_run, seen, documents, documents, longest, longest, softmax_scale=scale
        )
        outputs.append(out.unflatten(0, (sharding.batch, sharding.length)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def head_rows(sharding: Sharding, ranges: list[HeadRange], rank: int) -> tuple[list[int], list[int]]:
    """Vectors of head_dim elements of q, k and v that a rank (sends to, receives from) each."""
    widths = [r.q_heads + 2 * r.kv_heads for r in ranges]
    send = [sharding.batch * sharding.tokens(rank) * width for width in widths]
    receive = [sharding.batch * sharding.tokens(source) * widths[rank] for source in range(sharding.ranks)]
    return send, receive


def output_rows(sharding: Sharding, ranges: list[HeadRange], rank: int) -> tuple[list[int], list[int]]:
    """Vectors of head_dim elements of the output that a rank (sends to, receives from) each."""
    send = [sharding.batch * sharding.tokens(to) * ranges[rank].q_heads for to in range(sharding.ranks)]
    receive = [sharding.batch * sharding.tokens(rank) * r.q_heads for r in ranges]
    return send, receive
