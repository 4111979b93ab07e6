"""The correctness gate: a kernel that is wrong is not timed.

The oracle is the reference on inputs upcast by one precision. A result passes when its largest and its root-mean-square
error are at most twice those of plain PyTorch in the case's own dtype. Up to `WHOLE_UP_TO` tokens everything is
compared; on longer sequences a few query rows at the start, in the middle and at the end are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longgen_kernels import AttentionPattern
from longgen_kernels.benchmark.cases import Case, Inputs
from longgen_kernels.benchmark.timing import Result
from longgen_kernels.kernels import reference
from longgen_kernels.kernels.problem import AttentionProblem

WHOLE_UP_TO = 16384
FACTOR = 2.0
ATOL = 1e-5
_SPOT_ROWS = 16
_PLAIN_ELEMENTS = 1 << 26  # scores of one tile of plain PyTorch, over all heads

Errors = tuple[float, float]  # largest, root mean square


class Gate:
    """Knows what a case's results must be; computed once, asked for each kernel."""

    def __init__(self, case: Case, inputs: Inputs, *, backward: bool = True) -> None:
        n = case.seqlen
        self.whole = n <= WHOLE_UP_TO
        self._spans = [(0, n)] if self.whole else [(lo, lo + _SPOT_ROWS) for lo in (0, n // 2, n - _SPOT_ROWS)]
        self._exact = self._by_rows(lambda lo, hi: _exact(case, inputs, lo, hi, backward))
        plain = self._by_rows(lambda lo, hi: _plain(case, inputs, lo, hi, backward))
        self.bounds: dict[str, Errors] = {}
        for name, value in plain.items():
            largest, rms = _errors(value, self._exact[name])
            self.bounds[name] = FACTOR * largest + ATOL, FACTOR * rms + ATOL

    def forward_failure(self, out: Result) -> str | None:
        """None if the output (batch, seqlen, q_heads, head_dim) is right, otherwise what is wrong with it."""
        assert isinstance(out, Tensor)
        return self._failure("out", out)

    def backward_failure(self, grads: Result) -> str | None:
        """None if the gradients (dq, dk, dv) are right, otherwise what is wrong with them."""
        assert isinstance(grads, tuple)
        failures = (self._failure(name, grad) for name, grad in zip(("dq", "dk", "dv"), grads, strict=True))
        return next((failure for failure in failures if failure is not None), None)

    def _by_rows(self, compute: Callable[[int, int], dict[str, Tensor]]) -> dict[str, Tensor]:
        parts = [compute(lo, hi) for lo, hi in self._spans]
        names = ("out", "dq") + (("dk", "dv") if self.whole else ())
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in names if name in parts[0]}

    def _failure(self, name: str, value: Tensor) -> str | None:
        if name not in self._exact:  # a gradient of k or v, of a sequence that is checked by rows
            return None if bool(value.isfinite().all()) else f"{name} holds inf or NaN"
        exact = self._exact[name]
        got = value if self.whole else torch.cat([value[:, lo:hi] for lo, hi in self._spans], dim=1)
        if got.shape != exact.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        for what, error, bound in zip(("largest", "rms"), _errors(got, exact), self.bounds[name], strict=True):
            if not error <= bound:  # a NaN is not
                return f"{name}: {what} error {error:.3g} against the reference, allowed {bound:.3g}"
        return None


def _errors(value: Tensor, exact: Tensor) -> Errors:
    difference = value.to(exact.dtype) - exact
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def _exact(case: Case, inputs: Inputs, lo: int, hi: int, backward: bool) -> dict[str, Tensor]:
    """Output rows [lo, hi), and what these rows contribute to the gradients."""
    wide = torch.float64 if case.dtype == torch.float32 else torch.float32
    q, dout = inputs.q[:, lo:hi].to(wide), inputs.dout[:, lo:hi].to(wide)
    k, v = inputs.k[:, :hi].to(wide), inputs.v[:, :hi].to(wide)
    problem = AttentionProblem(q, k, v, case.pattern, case.head_dim**-0.5, q_start=lo)
    out, lse = reference.attn_fwd(problem)
    if not backward:
        return {"out": out}
    dq, dk, dv = reference.attn_bwd(problem, dout, out, lse, None)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _plain(case: Case, inputs: Inputs, lo: int, hi: int, backward: bool) -> dict[str, Tensor]:
    """The same in plain PyTorch in the case's dtype; dk and dv of the tiles are summed in fp32."""
    outs, dqs = [], []
    dk = torch.zeros_like(inputs.k[:, :hi], dtype=torch.float32)
    dv = torch.zeros_like(dk)
    for tile_lo, tile_hi in _tiles(case, lo, hi):
        rows = slice(tile_lo, tile_hi)
        views = inputs.q[:, rows], inputs.k[:, :tile_hi], inputs.v[:, :tile_hi]
        q, k, v = (x.detach().requires_grad_(backward) for x in views)
        out = plain_attention(q, k, v, case.pattern, tile_lo)
        outs.append(out.detach())
        if backward:
            grads = torch.autograd.grad(out, (q, k, v), inputs.dout[:, rows])
            dqs.append(grads[0])
            dk[:, :tile_hi] += grads[1]
            dv[:, :tile_hi] += grads[2]
    result = {"out": torch.cat(outs, dim=1)}
    return result | {"dq": torch.cat(dqs, dim=1), "dk": dk, "dv": dv} if backward else result


def _tiles(case: Case, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PLAIN_ELEMENTS // (case.batch * case.q_heads * hi))
    for tile_lo in range(lo, hi, step):
        yield tile_lo, min(hi, tile_lo + step)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, q_start: int) -> Tensor:
    """Masked softmax attention as one writes it in PyTorch, every step in the inputs' dtype; differentiable.

    q (batch, rows, q_heads, head_dim) at positions from `q_start`; k, v (batch, keys, kv_heads, head_dim) from 0.
    """
    kv_heads = k.shape[2]
    q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (batch, kv_heads, group, rows, head_dim)
    k, v = (x.transpose(1, 2)[:, :, None] for x in (k, v))
    q_pos = torch.arange(q_start, q_start + q.shape[3], device=q.device)[:, None]
    k_pos = torch.arange(k.shape[3], device=q.device)
    heads: int | Tensor = 0
    if pattern.head_phase_step:
        heads = torch.arange(kv_heads, device=q.device).view(-1, 1, 1, 1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    probs = scores.masked_fill(~pattern.is_visible(q_pos, k_pos, heads), -torch.inf).softmax(-1)
    out: Tensor = (probs @ v).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out
