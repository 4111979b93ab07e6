"""Attention in plain PyTorch, in fp32 (fp64 for fp64 inputs), tiled over query rows.

`attention` is the oracle: differentiable by autograd alone. `attn_fwd` and `attn_bwd` are the same arithmetic with the
gradient written out, so that the operators can run on any device, and are tested against the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import AttentionPattern, BlockMask

# Scores of one tile, over batch and heads, stay below this many elements: 2 MB in fp32, which a CPU's cache holds, and
# 64 MB on a GPU, where launches would cost more than memory.
TILE_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 24}


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None: the reference runs every problem, anywhere."""
    return None


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output (like q) and LSE (fp32 or fp64) of a problem, differentiable by autograd."""
    outs, lses = [], []
    for one in _sequences(problem):
        parts = [_rows_fwd(one, lo, hi) for lo, hi in one.row_tiles()]
        outs.append(torch.cat([out for out, _ in parts], dim=3))
        lses.append(torch.cat([lse for _, lse in parts], dim=3))
    # (batch, kv_heads, group, seqlen, head_dim) -> (batch, seqlen, q_heads, head_dim)
    flat_out = [out.permute(0, 3, 1, 2, 4).flatten(2, 3) for out in outs]
    flat_lse = [lse.flatten(1, 2) for lse in lses]
    if problem.varlen:
        return _pad_packed(problem, torch.cat([o[0] for o in flat_out]), torch.cat([x[0] for x in flat_lse], dim=1))
    return flat_out[0].to(problem.q.dtype), flat_lse[0]


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output and LSE without a graph."""
    with torch.no_grad():
        out, lse = attention(problem)
    return out.contiguous(), lse.contiguous()


def attn_bwd(
    problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output and (unless None) of the LSE.

    With P = exp(S - lse) and S = scale * Q K^T:  dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O) + dlse),
    dQ = scale * dS K,  dK = scale * dS^T Q.
    """
    with torch.no_grad():
        dq, dk, dv = (torch.zeros(x.shape, dtype=_accumulator(x), device=x.device) for x in _qkv(problem))
        for one in _sequences(problem, dout=dout, out=out, lse=lse, dlse=dlse, dq=dq, dk=dk, dv=dv):
            for lo, hi in one.row_tiles():
                _rows_bwd(one, lo, hi)
    dtype = problem.q.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _qkv(problem: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.q, problem.k, problem.v


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class _Sequence:
    """One unpacked problem with heads split as (kv_heads, group): q-like (batch, kv_heads, group, rows, head_dim)."""

    q: Tensor
    k: Tensor  # (batch, kv_heads, 1, rows, head_dim), as v, dk and dv
    v: Tensor
    pattern: AttentionPattern | BlockMask
    scale: float
    q_start: int
    k_start: int
    dout: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None  # (batch, kv_heads, group, rows), as dlse
    dlse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        batch, kv_heads, group, rows, _ = self.q.shape
        limit = TILE_ELEMENTS["cpu" if self.q.device.type == "cpu" else "gpu"]
        step = max(1, limit // max(1, batch * kv_heads * group * self.k.shape[3]))
        for lo in range(0, max(rows, 1), step):
            yield lo, min(rows, lo + step)

    def keys_for(self, hi: int) -> int:
        """How many leading keys the rows before `hi` can see at all."""
        n_keys = self.k.shape[3]
        if not self.pattern.causal_only:
            return n_keys
        return min(n_keys, max(0, self.q_start + hi - self.k_start))

    def mask(self, lo: int, hi: int, n_keys: int) -> Tensor:
        """Visible pairs, broadcastable to (kv_heads, group, hi - lo, n_keys)."""
        device = self.q.device
        kv_heads, group = self.q.shape[1:3]
        q_pos = torch.arange(self.q_start + lo, self.q_start + hi, device=device)[:, None]
        k_pos = torch.arange(self.k_start, self.k_start + n_keys, device=device)[None, :]
        if isinstance(self.pattern, BlockMask):
            head = torch.arange(kv_heads * group, device=device) // (kv_heads * group // self.pattern.heads)
            return self.pattern.is_visible(q_pos, k_pos, head.view(kv_heads, group, 1, 1))
        if self.pattern.head_phase_step == 0:
            return self.pattern.is_visible(q_pos, k_pos)[None, None]
        return self.pattern.is_visible(q_pos, k_pos, torch.arange(kv_heads, device=device).view(-1, 1, 1, 1))


def _sequences(problem: AttentionProblem, **like: Tensor | None) -> Iterator[_Sequence]:
    """The problem's sequences, unpacked; `like` are further tensors in the layout of q, k or the LSE, sliced alike."""
    group = problem.q_heads // problem.kv_heads

    def heads_first(name: str, x: Tensor) -> Tensor:  # (batch, rows, heads, head_dim) -> five dimensions
        group_dim = 1 if name in ("k", "v", "dk", "dv") else group
        split_heads: Tensor = x.unflatten(2, (problem.kv_heads, group_dim))
        return split_heads.permute(0, 2, 3, 1, 4)

    def split(name: str, x: Tensor, rows: slice | None) -> Tensor:
        if name in ("lse", "dlse"):
            x = x if rows is None else x[None, :, rows]
            lse_like: Tensor = x.unflatten(1, (problem.kv_heads, group))
            return lse_like
        return heads_first(name, x if rows is None else x[None, rows])

    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, **{n: x for n, x in like.items() if x is not None}}
    for q_rows, k_rows, q_start, k_start in _extents(problem):
        views = {n: split(n, x, k_rows if n in ("k", "v", "dk", "dv") else q_rows) for n, x in tensors.items()}
        yield _Sequence(pattern=problem.pattern, scale=problem.softmax_scale, q_start=q_start, k_start=k_start, **views)


def _extents(problem: AttentionProblem) -> Iterator[tuple[slice | None, slice | None, int, int]]:
    """Rows of q and k, and both starts, of each sequence; whole tensors (None) when nothing is packed."""
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        yield None, None, problem.q_start, problem.k_start
        return
    cu_q, cu_k = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    q_starts = None if problem.q_starts is None else problem.q_starts.tolist()
    k_starts = None if problem.k_starts is None else problem.k_starts.tolist()
    for b in range(problem.batch):
        q_rows, k_rows = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        k_start = k_starts[b] if k_starts else 0
        suffix = k_start + (cu_k[b + 1] - cu_k[b]) - (cu_q[b + 1] - cu_q[b])
        yield q_rows, k_rows, q_starts[b] if q_starts else suffix, k_start


def _pad_packed(problem: AttentionProblem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a packed q past the last sequence belong to nobody: output 0, LSE -inf."""
    rest = problem.q.shape[0] - out.shape[0]
    out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, rest))
    lse = torch.nn.functional.pad(lse, (0, rest), value=-torch.inf)
    return out.to(problem.q.dtype), lse


def _scores(one: _Sequence, lo: int, hi: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masked scores of the rows [lo, hi), and q, k and v of the tile in the accumulator's dtype."""
    n_keys = one.keys_for(hi)
    dtype = _accumulator(one.q)
    q, k, v = one.q[..., lo:hi, :].to(dtype), one.k[..., :n_keys, :].to(dtype), one.v[..., :n_keys, :].to(dtype)
    scores = (q @ k.mT) * one.scale
    return scores.masked_fill(~one.mask(lo, hi, n_keys), -torch.inf), q, k, v


def _rows_fwd(one: _Sequence, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    scores, _, _, v = _scores(one, lo, hi)
    if scores.shape[-1] == 0:
        return v.new_zeros(one.q[..., lo:hi, :].shape), scores.new_full(scores.shape[:-1], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees nothing has LSE -inf; any finite value in its place makes its probabilities exp(-inf) = 0.
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return probs @ v, lse


def _rows_bwd(one: _Sequence, lo: int, hi: int) -> None:
    assert one.dout is not None and one.out is not None and one.lse is not None
    assert one.dq is not None and one.dk is not None and one.dv is not None
    scores, q, k, v = _scores(one, lo, hi)
    lse = one.lse[..., lo:hi].to(scores.dtype)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    dout = one.dout[..., lo:hi, :].to(scores.dtype)
    delta = (dout * one.out[..., lo:hi, :].to(scores.dtype)).sum(-1)
    if one.dlse is not None:  # of a row that sees nothing it is often NaN
        delta = delta - one.dlse[..., lo:hi].masked_fill(lse == -torch.inf, 0.0)
    dscores = probs * (dout @ v.mT - delta[..., None]) * one.scale
    n_keys = k.shape[-2]
    one.dq[..., lo:hi, :] = dscores @ k
    one.dk[..., :n_keys, :] += (dscores.mT @ q).sum(2, keepdim=True)
    one.dv[..., :n_keys, :] += (probs.mT @ dout).sum(2, keepdim=True)
