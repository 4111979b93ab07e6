"""Launches the forward attention kernel of csrc/sm90."""

from __future__ import annotations

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import DTYPE_NAMES, TILE, address, argument, hopper_unsupported
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import BlockMask


def attention_unsupported(problem: AttentionProblem) -> str | None:
    """None if the Hopper forward kernel runs the problem, otherwise the reason."""
    reason = hopper_unsupported(problem)
    if reason is not None:
        return reason
    block_size = problem.pattern.block_size or TILE
    if block_size < TILE:
        return f"is slower than Triton's kernel for blocks of less than {TILE} tokens, got {block_size}"
    return None


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`)."""
    from longgen_kernels import _C

    q, k, pattern = problem.q, problem.k, problem.pattern
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        _C.attn_fwd_sm90(
            pattern=pattern.encode(),
            mask_rows=address(pattern.rows if isinstance(pattern, BlockMask) else None),
            batch=problem.batch,
            seqlen_q=q.shape[-3],
            seqlen_k=k.shape[-3],
            q_heads=problem.q_heads,
            kv_heads=problem.kv_heads,
            head_dim=problem.head_dim,
            dtype=DTYPE_NAMES[q.dtype],
            softmax_scale=problem.softmax_scale,
            **argument("q", q),
            **argument("k", k),
            **argument("v", problem.v),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            q_start=problem.q_start,
            k_start=problem.k_start,
            cu_seqlens_q=address(problem.cu_seqlens_q),
            cu_seqlens_k=address(problem.cu_seqlens_k),
            q_starts=address(problem.q_starts),
            k_starts=address(problem.k_starts),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return out, lse
