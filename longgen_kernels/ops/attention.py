"""The attention operators `torch.ops.longgen_kernels.attn_fwd` and `attn_bwd`.

Functional, with fake implementations and autograd, so that torch.compile, CUDA graphs and activation checkpointing see
ordinary operators. A pattern travels as the ints of its `encode()` and, for block masks, two index tensors; the backend
is chosen inside the operator, when it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.kernels import cuda, reference, triton
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import decode_pattern

BACKENDS = {"cuda": cuda, "triton": triton, "reference": reference}

lib = torch.library.Library("longgen_kernels", "FRAGMENT")

_PROBLEM = (
    "int[] pattern, Tensor? mask_rows, Tensor? mask_cols, float softmax_scale, SymInt q_start, SymInt k_start, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_starts, Tensor? k_starts, bool deterministic, str backend"
)
lib.define(f"attn_fwd(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor, Tensor)")
lib.define(
    "attn_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor, Tensor, Tensor)"
)


def support(problem: AttentionProblem) -> dict[str, dispatch.Support]:
    """For each backend that implements attention, the question whether it can run this problem."""
    return {name: lambda b=backend: b.attention_unsupported(problem) for name, backend in BACKENDS.items()}  # type: ignore[misc]


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: list[int],
    mask_rows: Tensor | None,
    mask_cols: Tensor | None,
    softmax_scale: float,
    q_start: int,
    k_start: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    deterministic: bool,
) -> AttentionProblem:
    decoded = decode_pattern(pattern, mask_rows, mask_cols)
    return AttentionProblem(
        q, k, v, decoded, softmax_scale, q_start, k_start, cu_seqlens_q, cu_seqlens_k, q_starts, k_starts, deterministic
    )


def backward_support(problem: AttentionProblem) -> dict[str, dispatch.Support]:
    """The same for the gradient. It need not run where forward ran: backends agree on what out and LSE mean."""
    return {name: lambda b=backend: b.backward_unsupported(problem) for name, backend in BACKENDS.items()}  # type: ignore[misc]


def _attn_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, v, *rest[:-1])
    backend = BACKENDS[dispatch.choose(rest[-1], support(problem), "attention", q.device.type)]
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), _empty_lse(problem).fill_(-torch.inf)
    out, lse = backend.attn_fwd(problem)
    return out, lse


def _attn_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, *rest[:-1])
    backend = BACKENDS[dispatch.choose(rest[-1], backward_support(problem), "attention's gradient", q.device.type)]
    if q.numel() == 0 or k.numel() == 0:
        return _zeros(q), _zeros(k), _zeros(v)
    dq, dk, dv = backend.attn_bwd(problem, dout, out, lse, dlse)
    return dq, dk, dv


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)


def _empty_lse(problem: AttentionProblem) -> Tensor:
    dtype = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    return torch.empty(problem.lse_shape, dtype=dtype, device=problem.q.device)


def _attn_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _empty_lse(_problem(q, k, v, *rest[:-1]))


def _attn_bwd_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, pattern, mask_rows, mask_cols, scale, q_start, k_start, *packing, deterministic, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, mask_rows, mask_cols, *packing)
    ctx.plain = pattern, scale, q_start, k_start, deterministic, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, mask_rows, mask_cols, *packing = ctx.saved_tensors
    pattern, scale, q_start, k_start, deterministic, backend = ctx.plain
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(out) if dout is None else dout
        grads = torch.ops.longgen_kernels.attn_bwd(
            dout, dlse, out, lse, q, k, v,
            pattern, mask_rows, mask_cols, scale, q_start, k_start, *packing, deterministic, backend,
        )  # fmt: skip
    return (*grads, *(None,) * 12)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("longgen_kernels attention has no second derivative")


def _register(name: str, impl: Any, fake: Any, backward: Any, setup: Any) -> None:
    for key in ("CPU", "CUDA"):
        lib.impl(name, impl, key)
    torch.library.register_fake(f"longgen_kernels::{name}", fake, lib=lib)
    torch.library.register_autograd(f"longgen_kernels::{name}", backward, setup_context=setup, lib=lib)


_register("attn_fwd", _attn_fwd, _attn_fwd_fake, _backward, _save_for_backward)
_register("attn_bwd", _attn_bwd, _attn_bwd_fake, _no_double_backward, lambda ctx, inputs, output: None)
