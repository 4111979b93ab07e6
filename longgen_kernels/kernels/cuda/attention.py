"""Launches the attention kernels of csrc/sm90."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.extension import available, runs_on
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import AttentionPattern, BlockMask

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_HEAD_DIMS = (64, 128)
_SMALLEST_MASK_BLOCK = 64  # a tile of 128 queries has at most two rows of a mask in it
_ANY_LENGTH = (1 << 31) - 1  # of all sequences together, which may share pages
_SMALLEST_BOX = 16  # keys that are copied at once; a tile is made of boxes from different places


@functools.cache
def _not_on(device: torch.device) -> str | None:
    reason = available(device)
    if reason is not None:
        return reason
    from longgen_kernels import _C

    built = [arch for arch in _C.build_info()["cuda_archs"].split(",") if arch == "90a"]
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(built, capability):
        return f"has attention for Hopper (90a) only; this build and GPU ({capability[0]}.{capability[1]}) do not meet"
    return None


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Hopper forward kernel runs the problem, otherwise the reason."""
    q, pattern = problem.q, problem.pattern
    reason = _not_on(q.device)
    if reason is not None:
        return reason
    if q.dtype not in _DTYPE_NAMES:
        return f"takes float16 and bfloat16, got {q.dtype}"
    if problem.head_dim not in _HEAD_DIMS:
        return f"takes head_dim 64 and 128, got {problem.head_dim}"
    if isinstance(pattern, BlockMask) and pattern.block_size < _SMALLEST_MASK_BLOCK:
        return f"takes block masks of at least {_SMALLEST_MASK_BLOCK}-token blocks, got {pattern.block_size}"
    if isinstance(pattern, AttentionPattern) and pattern.stride and (pattern.block_size or 1) < _SMALLEST_BOX:
        return f"takes strided blocks of at least {_SMALLEST_BOX} tokens, got {pattern.block_size}"
    if problem.block_table is not None:
        page_size = problem.k.shape[1]
        if page_size < _SMALLEST_BOX or page_size & (page_size - 1):
            return f"takes pages of a power of two of at least {_SMALLEST_BOX} tokens, got {page_size}"
    for name, x in (("q", q), ("k", problem.k), ("v", problem.v)):
        strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
        if x.data_ptr() % 16 != 0 or any(s <= 0 or s % 8 != 0 for s in strides):
            return f"takes {name} with rows at multiples of 16 bytes, got strides {x.stride()}"
    return None


def backward_unsupported(problem: AttentionProblem) -> str | None:
    """Why there is no backward pass."""
    return "has no backward pass for attention yet"


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`)."""
    from longgen_kernels import _C

    q, k, pattern, table = problem.q, problem.k, problem.pattern, problem.block_table
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        _C.attn_fwd_sm90(
            pattern=pattern.encode(),
            mask_rows=_address(pattern.rows if isinstance(pattern, BlockMask) else None),
            batch=problem.batch,
            seqlen_q=q.shape[-3],
            seqlen_k=k.shape[-3] if table is None else _ANY_LENGTH,
            q_heads=problem.q_heads,
            kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            dtype=_DTYPE_NAMES[q.dtype],
            softmax_scale=problem.softmax_scale,
            **_argument("q", q),
            **_argument("k", k),
            **_argument("v", problem.v),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            q_start=problem.q_start,
            k_start=problem.k_start,
            cu_seqlens_q=_address(problem.cu_seqlens_q),
            cu_seqlens_k=_address(problem.cu_seqlens_k),
            q_starts=_address(problem.q_starts),
            k_starts=_address(problem.k_starts),
            block_table=_address(table),
            pages=k.shape[0] if table is not None else 0,
            page_size=k.shape[1] if table is not None else 0,
            table_pages=table.shape[1] if table is not None else 0,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out, lse


def _argument(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor as address and strides of (batch, seqlen, heads); a packed one is a batch of one."""
    strides = (x.stride(0) if x.ndim == 4 else 0, x.stride(-3), x.stride(-2))
    return {name: x.data_ptr(), f"{name}_strides": strides}


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
