"""Launches the attention kernels of csrc/sm90."""

from __future__ import annotations

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import (
    DTYPE_NAMES,
    address,
    current_stream,
    hopper_unsupported,
    on_device,
)
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import AttentionPattern, BlockMask

_ANY_LENGTH = (1 << 31) - 1  # of all sequences together, which may share pages
_SMALLEST_BOX = 16  # keys that are copied at once; a tile is made of boxes from different places


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Hopper forward kernel runs the problem, otherwise the reason."""
    # A tile of 128 queries has at most two rows of a mask in it.
    reason = hopper_unsupported(problem, head_dims=(64, 128), smallest_mask_block=64)
    if reason is not None:
        return reason
    pattern = problem.pattern
    if isinstance(pattern, AttentionPattern) and pattern.stride and (pattern.block_size or 1) < _SMALLEST_BOX:
        return f"takes strided blocks of at least {_SMALLEST_BOX} tokens, got {pattern.block_size}"
    if problem.block_table is not None:
        page_size = problem.k.shape[1]
        if page_size < _SMALLEST_BOX or page_size & (page_size - 1):
            return f"takes pages of a power of two of at least {_SMALLEST_BOX} tokens, got {page_size}"
    return None


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`)."""
    from longgen_kernels import _C

    q, k, v, pattern, table = problem.q, problem.k, problem.v, problem.pattern, problem.block_table
    *_, seqlen_q, q_heads, head_dim = q.shape
    *_, seqlen_k, kv_heads, _ = k.shape
    pages, page_size, table_pages = 0, 0, 0
    if table is not None:
        pages, page_size, table_pages, seqlen_k = k.shape[0], k.shape[1], table.shape[1], _ANY_LENGTH
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(*problem.lse_shape, dtype=torch.float32)
    with on_device(q):
        # By position: as keywords they would cost the host more than an allocation.
        _C.attn_fwd_sm90(
            pattern.encode(), address(pattern.rows if isinstance(pattern, BlockMask) else None),
            problem.batch, seqlen_q, seqlen_k, q_heads, kv_heads, head_dim,
            DTYPE_NAMES[q.dtype], problem.softmax_scale,
            q.data_ptr(), q.stride(), k.data_ptr(), k.stride(), v.data_ptr(), v.stride(),
            out.data_ptr(), lse.data_ptr(),
            problem.q_start, problem.k_start, address(problem.cu_seqlens_q), address(problem.cu_seqlens_k),
            address(problem.q_starts), address(problem.k_starts),
            address(table), pages, page_size, table_pages, current_stream(q),
        )  # fmt: skip
    return out, lse
