"""The attention operators `torch.ops.longgen_kernels.attn_fwd`, `attn_paged_fwd` and `attn_bwd`.

Functional, with fake implementations and autograd, so that torch.compile, CUDA graphs and activation checkpointing see
ordinary operators. A pattern travels as the ints of its `encode()` and, for block masks, two index tensors; the backend
is chosen inside the operator, when it runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch
from longgen_kernels.kernels import cuda, reference, triton
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.ops.eager import is_plain_eager
from longgen_kernels.patterns import BlockMask, decode_pattern

BACKENDS = {"cuda": cuda, "triton": triton, "reference": reference}
SUPPORT = {name: backend.attention_unsupported for name, backend in BACKENDS.items()}
# The gradient need not run where forward ran: backends agree on what out and LSE mean.
BACKWARD_SUPPORT = {name: backend.backward_unsupported for name, backend in BACKENDS.items()}

lib = torch.library.Library("longgen_kernels", "FRAGMENT")

_PROBLEM = (
    "int[] pattern, Tensor? mask_rows, Tensor? mask_cols, float softmax_scale, SymInt q_start, SymInt k_start, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_starts, Tensor? k_starts, bool deterministic, str backend"
)
lib.define(f"attn_fwd(Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor, Tensor)")
lib.define(f"attn_paged_fwd(Tensor q, Tensor k, Tensor v, Tensor block_table, {_PROBLEM}) -> (Tensor, Tensor)")
lib.define(
    "attn_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, "
    f"Tensor q, Tensor k, Tensor v, {_PROBLEM}) -> (Tensor, Tensor, Tensor)"
)


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


def _attn_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _run_fwd(_problem(q, k, v, *rest[:-1]), rest[-1])


def _attn_paged_fwd(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, v, *rest[:-1])._replace(block_table=block_table)
    if q.device.type != "cuda" or cuda.attention_unsupported(problem) is not None:
        problem = problem.gathered()  # the other backends read packed keys
    return _run_fwd(problem, rest[-1])


def _run_fwd(problem: AttentionProblem, requested: str) -> tuple[Tensor, Tensor]:
    q = problem.q
    backend = BACKENDS[dispatch.choose(requested, SUPPORT, problem, "attention", q.device.type)]
    if q.numel() == 0 or problem.k.numel() == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), _empty_lse(problem).fill_(-torch.inf)
    out, lse = backend.attn_fwd(problem)
    return out, lse


def _attn_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, v, *rest[:-1])
    backend = BACKENDS[dispatch.choose(rest[-1], BACKWARD_SUPPORT, problem, "attention's gradient", q.device.type)]
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


def _attn_paged_fwd_fake(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attn_fwd_fake(q, k, v, *rest)


def _attn_bwd_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def attend(problem: AttentionProblem, backend: str) -> tuple[Tensor, Tensor]:
    """Runs a checked problem through its operator, or without it where nobody could tell."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.block_table is not None:
        out, lse = torch.ops.longgen_kernels.attn_paged_fwd.default(
            q, k, v, problem.block_table, *_arguments(problem, backend)
        )
        return out, lse
    if not is_plain_eager(q, k, v):
        out, lse = torch.ops.longgen_kernels.attn_fwd.default(q, k, v, *_arguments(problem, backend))
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        run = partial(_run_fwd, problem, backend)
        out, lse = _Attention.apply(run, q, k, v, _arguments(problem, backend))  # type: ignore[no-untyped-call]
    else:
        out, lse = _run_fwd(problem, backend)
    return out, lse


def _arguments(problem: AttentionProblem, backend: str) -> tuple[Any, ...]:
    """What follows q, k and v in a call of the operators."""
    pattern = problem.pattern
    mask = pattern if isinstance(pattern, BlockMask) else None
    return (
        pattern.encode(), mask.rows if mask else None, mask.cols if mask else None,
        problem.softmax_scale, problem.q_start, problem.k_start, problem.cu_seqlens_q, problem.cu_seqlens_k,
        problem.q_starts, problem.k_starts, problem.deterministic, backend,
    )  # fmt: skip


# Autograd looks at each argument of a function, so that all but the tensors that may need gradients come as one tuple.
# `run` computes the results, with the dispatcher or without.


class _Attention(torch.autograd.Function):
    """The operator on tensors that need gradients."""

    @staticmethod
    def forward(ctx: Any, run: Any, q: Tensor, k: Tensor, v: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        out, lse = run()
        pattern, mask_rows, mask_cols, scale, q_start, k_start, *packing, deterministic, backend = rest
        ctx.save_for_backward(q, k, v, out, lse, mask_rows, mask_cols, *packing)
        ctx.plain = pattern, scale, q_start, k_start, deterministic, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask_rows, mask_cols, *packing = ctx.saved_tensors
        pattern, scale, q_start, k_start, deterministic, backend = ctx.plain
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if dout is not None or dlse is not None:
            dout = torch.zeros_like(out) if dout is None else dout
            grads = torch.ops.longgen_kernels.attn_bwd.default(
                dout, dlse, out, lse, q, k, v,
                pattern, mask_rows, mask_cols, scale, q_start, k_start, *packing, deterministic, backend,
            )  # fmt: skip
        return (None, *grads, None)


class _PagedAttention(torch.autograd.Function):
    """Attention to pages of keys on tensors that need gradients, which it cannot give."""

    @staticmethod
    def forward(ctx: Any, run: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = run()
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("attention with a block_table has no gradient")


class _AttentionGradient(torch.autograd.Function):
    """The gradient on tensors that need gradients, which it cannot give."""

    @staticmethod
    def forward(ctx: Any, run: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = run()
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError("longgen_kernels attention has no second derivative")


def _register(name: str, impl: Any, fake: Any, function: type[torch.autograd.Function], tensors: int) -> None:
    """Registers the kernels of an operator whose first `tensors` arguments may need gradients.

    `torch.library.register_autograd` would do, but for an operator of 15 arguments it takes 50 microseconds a call to
    look for defaults.
    """

    def autograd(keyset: Any, *args: Any) -> Any:
        op = getattr(torch.ops.longgen_kernels, name).default
        run = partial(op.redispatch, keyset & torch._C._after_autograd_keyset, *args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args[:tensors]):
            return function.apply(run, *args[:tensors], args[tensors:])
        return run()

    for key in ("CPU", "CUDA"):
        lib.impl(name, impl, key)
    torch.library.register_fake(f"longgen_kernels::{name}", fake, lib=lib)
    lib.impl(name, autograd, "Autograd", with_keyset=True)


_register("attn_fwd", _attn_fwd, _attn_fwd_fake, _Attention, tensors=3)
_register("attn_paged_fwd", _attn_paged_fwd, _attn_paged_fwd_fake, _PagedAttention, tensors=3)
_register("attn_bwd", _attn_bwd, _attn_bwd_fake, _AttentionGradient, tensors=7)
