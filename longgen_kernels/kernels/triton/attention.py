"""Host side of the Triton attention kernels: arguments, grids, launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.kernels.triton.backward import attn_bwd_dkdv_kernel, attn_bwd_dq_kernel, bwd_rows_kernel
from longgen_kernels.kernels.triton.forward import attn_fwd_kernel
from longgen_kernels.kernels.triton.tiles import INTERPRETED, Tile, padded_head_dim, tile_for
from longgen_kernels.patterns import BlockMask


def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`)."""
    q, k, v = problem.q, problem.k, problem.v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    tile = _tile("fwd", problem)
    flags = _flags(problem, tile)
    flags["TMA"] = not flags["GATHER"] and _tma_can_read(problem, k, v)
    k_source, v_source = _sources(flags["TMA"], tile.block_n, k, v)
    with _device_of(q):
        attn_fwd_kernel[_query_grid(problem, tile.block_m)](
            q, k_source, v_source, out, lse, *_packing(problem), _mask_list(problem, "rows"),
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_lse_strides(lse),
            **_common(problem, "q_blocks"), **flags,
        )  # fmt: skip
    return out, lse


def attn_bwd(
    problem: AttentionProblem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous. Workspace: two fp32 numbers per query row and head."""
    q, k, v = problem.q, problem.k, problem.v
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rows, block = q.shape[-3], 16 if INTERPRETED else 64
    # The bulk tensor copy engine reads these too, from multiples of 16 bytes: so many rows of padding put each tile
    # (whose positions are multiples of its size) there.
    pad = 0 if problem.varlen else problem.q_start % 4
    stats_shape = (*lse.shape[:-1], math.ceil((pad + rows) / 4) * 4)
    padded_stats = [torch.empty(stats_shape, dtype=torch.float32, device=q.device) for _ in range(2)]
    delta, lse_log2 = (x[..., pad : pad + rows] for x in padded_stats)
    dlse_strides = (0, 0, 0) if dlse is None else (*_lse_strides(dlse), dlse.stride(-1))
    batch = 1 if problem.varlen else problem.batch
    block_d = padded_head_dim(problem.head_dim)
    with _device_of(q):
        bwd_rows_kernel[(math.ceil((pad + rows) / block), problem.q_heads, batch)](
            dout, out, lse, dlse, *padded_stats, *_strides(dout), *_strides(out), *_lse_strides(lse),
            *dlse_strides, *_lse_strides(delta), rows, pad, problem.head_dim, block_d, block, dlse is not None,
        )  # fmt: skip
        strides = *_strides(q), *_strides(k), *_strides(v), *_strides(dout)
        tile = _tile("dkdv", problem)
        flags = _flags(problem, tile)
        flags["TMA"] = _tma_can_read(problem, q, dout)
        q_source, dout_source = _sources(flags["TMA"], tile.block_m, q, dout)
        lse_source, delta_source = lse_log2, delta
        if flags["TMA"]:
            delta_source, lse_source = (_descriptor(x[..., : pad + rows], [1, 1, tile.block_m]) for x in padded_stats)
        grid, slack = _key_grid(problem, tile.block_n)
        attn_bwd_dkdv_kernel[grid](
            q_source, k, v, dout_source, lse_source, delta_source, dk, dv,
            *_packing(problem), _mask_list(problem, "cols"), *strides, *_strides(dk), *_lse_strides(delta),
            kv_heads=problem.kv_heads, slack=slack, scale=problem.softmax_scale,
            **_common(problem, "k_blocks"), **flags,
        )  # fmt: skip
        tile = _tile("dq", problem)
        flags = _flags(problem, tile)
        flags["TMA"] = not flags["GATHER"] and _tma_can_read(problem, k, v)
        k_source, v_source = _sources(flags["TMA"], tile.block_n, k, v)
        attn_bwd_dq_kernel[_query_grid(problem, tile.block_m)](
            q, k_source, v_source, dout, lse_log2, delta, dq, *_packing(problem), _mask_list(problem, "rows"),
            *strides, *_strides(dq), *_lse_strides(delta),
            scale=problem.softmax_scale, **_common(problem, "q_blocks"), **flags,
        )  # fmt: skip
    return dq, dk, dv


def _tile(kernel: str, problem: AttentionProblem) -> Tile:
    pattern = problem.pattern
    mask_block = pattern.block_size if isinstance(pattern, BlockMask) else None
    return tile_for(kernel, problem.head_dim, problem.q.dtype, problem.q.device, mask_block)


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device; CPU tensors (the interpreter) need none."""
    return torch.cuda.device_of(x)


def _query_grid(problem: AttentionProblem, block_m: int) -> tuple[int, int, int]:
    rows = problem.q.shape[-3]
    if problem.varlen:  # two more tiles a sequence, as `sequence_of` counts them
        return rows // block_m + 2 * problem.batch + 2, problem.q_heads, 1
    return math.ceil((rows + problem.q_start % block_m) / block_m), problem.q_heads, problem.batch


def _key_grid(problem: AttentionProblem, block_n: int) -> tuple[tuple[int, int, int], int]:
    """Grid of the key tiles, and how many tiles a sequence may have beyond its length.

    Each of the three classes of columns (sink, strided, local) has ragged tiles at both ends, and the blocks cut by
    the sequence's ends count whole. All on the first axis: the others end at 65535.
    """
    rows = problem.k.shape[-3]
    block_size = problem.pattern.block_size or 1
    slack = 6 + 4 * math.ceil(min(block_size, rows) / block_n)
    if problem.varlen:
        return ((rows // block_n + slack * (problem.batch + 1)) * problem.kv_heads, 1, 1), slack
    return ((math.ceil(rows / block_n) + slack) * problem.kv_heads, 1, problem.batch), slack


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, rows and heads; a packed tensor has no batch."""
    return (x.stride(0) if x.ndim == 4 else 0, x.stride(-3), x.stride(-2))


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    return (lse.stride(0) if lse.ndim == 3 else 0, lse.stride(-2))


def _tma_can_read(problem: AttentionProblem, *tensors: Tensor) -> bool:
    """Can the bulk tensor copy engine (Hopper and newer) feed a kernel's stream of tiles from these tensors?

    Not from packed sequences: it cannot stop at a sequence's end, and a neighbour's NaN times a weight of 0 is NaN.
    """
    if problem.varlen or problem.q.dtype.itemsize != 2:
        return False
    if not INTERPRETED and (torch.version.hip or torch.cuda.get_device_capability(problem.q.device) < (9, 0)):
        return False
    return all(x.data_ptr() % 16 == 0 and all(0 < n and n % 8 == 0 for n in x.stride()[:-1]) for x in tensors)


def _sources(tma: bool, rows: int, *tensors: Tensor) -> list[Any]:
    """The tensors, or descriptors of them as (batch, heads, seqlen, head_dim) that yield tiles of `rows` rows."""
    if not tma:
        return list(tensors)
    return [_descriptor(x.transpose(1, 2), [1, 1, rows, padded_head_dim(x.shape[-1])]) for x in tensors]


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _packing(problem: AttentionProblem) -> tuple[Tensor | None, ...]:
    return problem.cu_seqlens_q, problem.cu_seqlens_k, problem.q_starts, problem.k_starts


def _mask_list(problem: AttentionProblem, which: str) -> Tensor | None:
    """Offsets and, behind them, entries of a block mask's rows or columns."""
    return getattr(problem.pattern, which) if isinstance(problem.pattern, BlockMask) else None


def _common(problem: AttentionProblem, lines: str) -> dict[str, Any]:
    """Plain-number arguments that the three attention kernels share."""
    pattern = problem.pattern
    numbers: dict[str, Any] = {
        "seqlen_q": problem.q.shape[-3],
        "seqlen_k": problem.k.shape[-3],
        "q_start": problem.q_start,
        "k_start": problem.k_start,
        "batch": problem.batch,
        "scale_log2": problem.softmax_scale * math.log2(math.e),
    }
    block_size = pattern.block_size or 1
    last = "mask_rows_per_head" if lines == "q_blocks" else "mask_cols_per_head"
    if isinstance(pattern, BlockMask):
        numbers |= {"sink": 0, "window": 0, "stride": 1, "phase_step": 0, "phase_offset": 0}
        numbers |= {"mask_group": problem.q_heads // pattern.heads, last: getattr(pattern, lines)}
        numbers |= {"mask_entries": pattern.heads * getattr(pattern, lines) + 1}
    else:
        stride = pattern.stride or 1
        window = pattern.window if pattern.window_blocks is None else pattern.window_blocks
        numbers |= {"sink": pattern.sink, "window": window or 0, "stride": stride, "mask_group": 1, last: 0}
        numbers |= {"mask_entries": 0}
        # Both reduced, so that phase_step * head cannot overflow.
        numbers |= {"phase_step": pattern.head_phase_step % stride, "phase_offset": pattern.head_phase_offset % stride}
    return numbers | {"log2_block": block_size.bit_length() - 1}


def _flags(problem: AttentionProblem, tile: Tile) -> dict[str, Any]:
    """What the kernels are compiled for."""
    pattern = problem.pattern
    block_mask = isinstance(pattern, BlockMask)
    window, strided = 0, False
    if not isinstance(pattern, BlockMask):
        strided = pattern.stride is not None
        window = 1 if pattern.window is not None else 2 if pattern.window_blocks is not None else 0
    flags: dict[str, Any] = {
        "GROUP": problem.q_heads // problem.kv_heads,
        "HEAD_DIM": problem.head_dim,
        "BLOCK_D": padded_head_dim(problem.head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_MASK": block_mask,
        "CAUSAL": pattern.causal_only,
        "WINDOW": window,
        "STRIDED": strided,
        "GATHER": strided and (pattern.block_size or 1) < tile.block_n,
        "VARLEN": problem.varlen,
        "HAS_Q_STARTS": problem.q_starts is not None,
        "HAS_K_STARTS": problem.k_starts is not None,
        "PRECISION": "ieee" if problem.q.dtype == torch.float32 else None,
        "STAGES": tile.num_stages,
    }
    return flags if INTERPRETED else flags | {"num_warps": tile.num_warps}
