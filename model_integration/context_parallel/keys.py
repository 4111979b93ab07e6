"""The exchange for sparse layers: a rank gets only the keys and values of earlier ranks that its queries see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from longgen_kernels import AttentionPattern, longgen_attn_varlen_func, merge_attn_states
from model_integration.context_parallel.exchange import exchange_rows
from model_integration.context_parallel.needs import Needs, needs_of
from model_integration.context_parallel.sharding import Sharding


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """How one rank sends and receives keys under one pattern.

    Attributes:
        send_index: (row, column, head) of the keys that it sends, those for rank 0 first.
        send, receive: how many go to, and come from, each rank.
        order: puts what arrives, sorted by owner, into the order of `needs`.
        idle: no rank needs anything, so that there is nothing to exchange.
    """

    needs: Needs
    send_index: tuple[Tensor, Tensor, Tensor]
    send: list[int]
    receive: list[int]
    order: Tensor
    idle: bool


@lru_cache(maxsize=16)
def plan_keys(
    sharding: Sharding, pattern: AttentionPattern, kv_heads: int, rank: int, device: torch.device | None = None
) -> KeyPlan:
    """A rank's part of the exchange, without asking the others."""
    everyone = [needs_of(sharding, pattern, kv_heads, other, device) for other in range(sharding.ranks)]
    own = everyone[rank]
    asked = [(needs, needs.owner == rank) for needs in everyone]
    send_index = tuple(torch.cat([getattr(n, name)[mine] for n, mine in asked]) for name in ("row", "column", "head"))
    return KeyPlan(
        own,
        send_index,  # type: ignore[arg-type]
        [int(mine.sum()) for _, mine in asked],
        own.rows_from(sharding.ranks),
        own.owner.argsort(stable=True).argsort(),
        not any(len(needs.owner) for needs in everyone),
    )


def attend_by_keys(
    sharding: Sharding,
    rank: int,
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    scale: float | None,
) -> Tensor:
    """Attention of a rank's queries (batch, tokens, heads, head_dim) to the keys they see, by exchanging those keys.

    k, v: (batch, tokens, kv_heads, head_dim). Returns the output, like q.
    """
    plan = plan_keys(sharding, pattern, k.shape[2], rank, q.device)
    needs = plan.needs
    # Key and value travel as one row. A rank that needs nothing still has the empty rows in its graph: backward is
    # collective too.
    received = torch.cat([k[plan.send_index], v[plan.send_index]], dim=-1)
    if not plan.idle:
        received = exchange_rows(received, plan.send, plan.receive, group)[plan.order]
    window, far = received.split([needs.window_rows, len(received) - needs.window_rows])
    out, lse = _attend_stretches(needs, q, k, v, window.unflatten(0, (-1, k.shape[2])), pattern, scale)
    if len(far):
        out = _merge_far(needs, q, far, out, lse, scale)
    return out.view_as(q)


def _attend_stretches(
    needs: Needs, q: Tensor, k: Tensor, v: Tensor, window: Tensor, pattern: AttentionPattern, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Each document's queries on its stretch of keys: the window (keys, kv_heads, 2 * head_dim), then the rank's own.

    Returns output (batch * tokens, heads, head_dim) and LSE (heads, batch * tokens).
    """
    lengths_k = [p.position - start + p.length for p, start in zip(needs.pieces, needs.window_starts, strict=True)]
    earlier = [0] * len(q)
    for piece, start in zip(needs.pieces, needs.window_starts, strict=True):
        earlier[piece.row] += piece.position - start
    window_k, window_v = window.chunk(2, dim=-1)
    keys, values = (
        torch.cat([part for pair in zip(remote.split(earlier), own, strict=True) for part in pair])
        for remote, own in ((window_k, k), (window_v, v))
    )
    lengths_q = [piece.length for piece in needs.pieces]
    return longgen_attn_varlen_func(
        q.flatten(0, 1),
        keys,
        values,
        pattern,
        _boundaries(lengths_q, q.device),
        _boundaries(lengths_k, q.device),
        max(lengths_q),
        max(lengths_k),
        softmax_scale=scale,
        return_lse=True,
        q_start=torch.tensor([p.position for p in needs.pieces], dtype=torch.int32, device=q.device),
        k_start=torch.tensor(needs.window_starts, dtype=torch.int32, device=q.device),
    )


def _merge_far(needs: Needs, q: Tensor, far: Tensor, out: Tensor, lse: Tensor, scale: float | None) -> Tensor:
    """The output with the attention to far keys (keys, 2 * head_dim) merged in.

    Every query of a document that began earlier sees all of them, in each KV head others: each row of the batch and
    KV head is a sequence of its own.
    """
    kv_heads = len(needs.far[0])
    rows = [piece for piece in needs.pieces if any(needs.far[piece.row]) and piece.position]
    lengths_q = [piece.length for piece in rows for _ in range(kv_heads)]
    lengths_k = [count for piece in rows for count in needs.far[piece.row]]
    # (tokens, heads, head_dim) -> (kv_heads * tokens, group, head_dim)
    queries = torch.cat([q[p.row, : p.length].unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1) for p in rows])
    keys, values = far[:, None].chunk(2, dim=-1)
    far_out, far_lse = longgen_attn_varlen_func(
        queries,
        keys,
        values,
        AttentionPattern.bidirectional(),
        _boundaries(lengths_q, q.device),
        _boundaries(lengths_k, q.device),
        max(lengths_q),
        max(lengths_k),
        softmax_scale=scale,
        return_lse=True,
    )
    sizes = [piece.length * kv_heads for piece in rows]
    merged, done = [], 0
    for piece, far_out_row, far_lse_row in zip(rows, far_out.split(sizes), far_lse.split(sizes, dim=1), strict=True):
        begin = piece.row * q.shape[1]
        part = slice(begin, begin + piece.length)
        far_out_row = far_out_row.unflatten(0, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        far_lse_row = far_lse_row.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(0, 1)
        merged += [out[done:begin], merge_attn_states(out[part], lse[:, part], far_out_row, far_lse_row)[0]]
        done = begin + piece.length
    return torch.cat([*merged, out[done:]])


def _boundaries(lengths: list[int], device: torch.device) -> Tensor:
    """int32 (len(lengths) + 1,) running sums."""
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
