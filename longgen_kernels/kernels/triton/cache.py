"""Host side of the Triton kernels on a KV cache: arguments, grids, launches."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from longgen_kernels.cache_scales import as_bytes
from longgen_kernels.kernels.cache_problem import (
    CacheProblem,
    CacheTensors,
    NewTokens,
    max_tiles,
    multiprocessors,
    num_splits,
)
from longgen_kernels.kernels.triton.cache_kernels import cache_append_kernel, cache_attn_kernel, cache_combine_kernel
from longgen_kernels.kernels.triton.tiles import INTERPRETED, Tile, cache_tile, padded_head_dim

_BLOCKS_PER_MULTIPROCESSOR = 2


def cache_append(cache: CacheTensors, new: NewTokens) -> None:
    """Writes the new tokens to their slots and adds them to the lengths."""
    _write(cache, new)
    _advance(cache, new)


def cache_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`), after the new tokens were appended."""
    if problem.new is not None:
        _write(problem.cache, problem.new)
    out, lse = _attend(problem)
    if problem.new is not None:
        _advance(problem.cache, problem.new)
    return out, lse


def _advance(cache: CacheTensors, new: NewTokens) -> None:
    if new.advance:
        cache.seqlens.add_(new.n if new.counts is None else new.counts.clamp(0, new.n))


def _write(cache: CacheTensors, new: NewTokens) -> None:
    if new.k.numel() == 0:
        return
    block_d = padded_head_dim(cache.head_dim)
    block_t = max(1, 2048 // block_d)
    numbers, flags = _layout(cache)
    numbers = {name: numbers[name] for name in numbers if name not in ("sink", "window")}
    del flags["WINDOW"]
    with torch.cuda.device_of(cache.k):
        cache_append_kernel[(triton.cdiv(new.n, block_t), cache.kv_heads, cache.batch)](
            new.k, new.v, as_bytes(cache.k), as_bytes(cache.v), cache.seqlens, new.counts, cache.block_table,
            cache.k_scale, cache.v_scale,
            *new.k.stride()[:3], *new.v.stride()[:3], *cache.k.stride()[:3], *cache.v.stride()[:3],
            n_new=new.n, **numbers, **flags, HEAD_DIM=cache.head_dim, BLOCK_D=block_d, BLOCK_T=block_t,
            HAS_COUNTS=new.counts is not None, FP8=cache.is_fp8,
        )  # fmt: skip


def _attend(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    q, cache, new = problem.q, problem.cache, problem.new
    batch, n, q_heads, head_dim = q.shape
    tile = _tile(problem)
    block_d = padded_head_dim(head_dim)
    row_tiles = triton.cdiv(n * problem.group, tile.block_m)
    splits = num_splits(
        batch * cache.kv_heads * row_tiles,
        max_tiles(cache, tile.block_n),
        _BLOCKS_PER_MULTIPROCESSOR * multiprocessors(q.device),
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    parts, part_lses = out, lse
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lses = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    numbers, flags = _layout(cache)
    with torch.cuda.device_of(q):
        cache_attn_kernel[(splits * row_tiles, cache.kv_heads, batch)](
            q, as_bytes(cache.k), as_bytes(cache.v), parts, part_lses, cache.seqlens,
            None if new is None else new.counts, cache.block_table, cache.k_scale, cache.v_scale,
            *q.stride()[:3], *cache.k.stride()[:3], *cache.v.stride()[:3], out.numel(), lse.numel(),
            n=n, n_new=0 if new is None else new.n, q_offset=problem.q_offset, splits=splits, row_tiles=row_tiles,
            scale_log2=problem.softmax_scale * math.log2(math.e), **numbers, **flags,
            GROUP=problem.group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HAS_COUNTS=new is not None and new.counts is not None, FP8=cache.is_fp8,
            PRECISION="ieee" if q.dtype == torch.float32 else None, STAGES=tile.num_stages,
            **({} if INTERPRETED else {"num_warps": tile.num_warps}),
        )  # fmt: skip
        if splits > 1:
            cache_combine_kernel[(batch * n * q_heads,)](
                parts, part_lses, out, lse, out.numel(), lse.numel(), n, q_heads, splits,
                HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=triton.next_power_of_2(splits),
            )  # fmt: skip
    return out, lse


def _tile(problem: CacheProblem) -> Tile:
    return cache_tile(problem.n * problem.group, problem.cache.head_dim, problem.q.dtype)


def _layout(cache: CacheTensors) -> tuple[dict[str, int], dict[str, bool | int]]:
    """The layout as plain numbers, and what the kernels are compiled for."""
    layout, pattern = cache.layout, cache.layout.pattern
    stride = pattern.stride or 1
    window = 0 if pattern.is_dense else 1 if pattern.window_blocks is None else 2
    numbers = {
        "slots": cache.slots,
        "pages": 0 if cache.block_table is None else cache.block_table.shape[1],
        "log2_page": 0 if cache.block_table is None else cache.page_size.bit_length() - 1,
        "sink": pattern.sink,
        "sink_slots": layout.sink_slots,
        "ring": layout.ring or 0,
        "window": (pattern.window if pattern.window_blocks is None else pattern.window_blocks) or 0,
        "stride": stride,
        "log2_block": (pattern.block_size or 1).bit_length() - 1,
        # Both reduced, so that phase_step * head cannot overflow.
        "phase_step": pattern.head_phase_step % stride,
        "phase_offset": pattern.head_phase_offset % stride,
    }
    flags = {
        "WINDOW": window,
        "STRIDED": pattern.stride is not None,
        "COMPACT": layout.is_compact,
        "PAGED": cache.block_table is not None,
    }
    return numbers, flags
