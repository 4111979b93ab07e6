"""Launches the backward attention kernels of csrc/sm90."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import (
    DTYPE_NAMES,
    address,
    argument,
    current_stream,
    has_aligned_rows,
    hopper_unsupported,
    on_device,
)
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import BlockMask

_SMALLEST_BOX = 16  # keys that the kernel of deterministic dQ fetches at once


def backward_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Hopper backward kernel runs the problem, otherwise the reason."""
    reason = hopper_unsupported(problem, head_dims=(64, 128), smallest_mask_block=128)
    if reason is not None:
        return reason
    pattern = problem.pattern
    if problem.deterministic and not isinstance(pattern, BlockMask) and pattern.stride is not None:
        block_size = pattern.block_size or 1
        if block_size < _SMALLEST_BOX:
            return f"takes strided blocks of at least {_SMALLEST_BOX} tokens with deterministic=True, got {block_size}"
    return None


def attn_bwd(
    problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous.

    Workspace: two and a half fp32 numbers per query row and head; unless deterministic an fp32 copy of dQ, which is
    added up in no fixed order; for few heads the partial sums of global keys' chunks, at most some 70 MB.
    """
    from longgen_kernels import _C

    q, k, v, pattern = problem.q, problem.k, problem.v, problem.pattern
    # Autograd hands over expanded gradients, whose strides are 0.
    dout, out = (x if has_aligned_rows(x) else x.contiguous() for x in (dout, out))
    lse = lse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sizes: dict[str, Any] = {
        "pattern": pattern.encode(),
        "batch": problem.batch,
        "seqlen_q": q.shape[-3],
        "seqlen_k": k.shape[-3],
        "q_heads": problem.q_heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "q_start": problem.q_start,
        "k_start": problem.k_start,
        "deterministic": problem.deterministic,
        "multiprocessors": _multiprocessors(q.device),
    }
    floats = _C.attn_bwd_sm90_workspace(**sizes, packed=problem.varlen)
    stats, dq_sum, partials = (
        torch.empty(floats[name], dtype=torch.float32, device=q.device) for name in ("stats", "dq_sum", "partials")
    )
    next_item = torch.empty(1, dtype=torch.int32, device=q.device)
    dlse_strides = (0, 0, 0)
    if dlse is not None:
        dlse_strides = (dlse.stride(0) if dlse.ndim == 3 else 0, dlse.stride(-2), dlse.stride(-1))
    with on_device(q):
        _C.attn_bwd_sm90(
            **sizes,
            mask_rows=address(pattern.rows if isinstance(pattern, BlockMask) else None),
            mask_cols=address(pattern.cols if isinstance(pattern, BlockMask) else None),
            dtype=DTYPE_NAMES[q.dtype],
            softmax_scale=problem.softmax_scale,
            **argument("q", q),
            **argument("k", k),
            **argument("v", v),
            **argument("out", out),
            **argument("dout", dout),
            lse=lse.data_ptr(),
            dlse=address(dlse),
            dlse_strides=dlse_strides,
            dq=dq.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            cu_seqlens_q=address(problem.cu_seqlens_q),
            cu_seqlens_k=address(problem.cu_seqlens_k),
            q_starts=address(problem.q_starts),
            k_starts=address(problem.k_starts),
            stats=stats.data_ptr(),
            dq_sum=dq_sum.data_ptr(),
            partials=partials.data_ptr(),
            next_item=next_item.data_ptr(),
            stream=current_stream(q),
        )
    return dq, dk, dv


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
