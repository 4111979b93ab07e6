"""The checked arguments of one attention call, which every backend takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longgen_kernels.patterns import MAX_POSITION, AttentionPattern, BlockMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionProblem(NamedTuple):
    """One attention call.

    q (batch, seqlen_q, q_heads, head_dim), k and v (batch, seqlen_k, kv_heads, head_dim); with `cu_seqlens_q` and
    `cu_seqlens_k` int32 (batch + 1,) they are packed: (total, heads, head_dim). Query row `i` stands at position
    `q_start + i`, key row `r` at `k_start + r`; packed, `q_starts` and `k_starts` int32 (batch,) say so per sequence,
    and None means suffix alignment with keys from 0. With `block_table` int32 (batch, table_pages) k and v are pools
    (pages, page_size, kv_heads, head_dim): key row `r` of sequence `b` is in page `block_table[b, r // page_size]`, and
    `cu_seqlens_k` says only how many keys each sequence has.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: AttentionPattern | BlockMask
    softmax_scale: float
    q_start: int = 0
    k_start: int = 0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    q_starts: Tensor | None = None
    k_starts: Tensor | None = None
    deterministic: bool = False
    block_table: Tensor | None = None

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def q_heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, q_heads, seqlen_q), or (q_heads, total_q) when packed."""
        *batch, seqlen_q, q_heads, _ = self.q.shape
        return (*batch, q_heads, seqlen_q)

    def gathered(self) -> AttentionProblem:
        """The same problem with the pages copied to where a packed batch has its keys; lengths stay on the device.

        Every sequence gets the rows of all its pages. Those behind its keys become a sequence of their own, without
        queries.
        """
        if self.block_table is None or self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return self
        pages = self.block_table.clamp(0, self.k.shape[0] - 1).long().flatten()
        k, v = (x[pages].flatten(0, 1) for x in (self.k, self.v))
        rows = self.block_table.shape[1] * self.k.shape[1]
        begins = torch.arange(self.batch, dtype=torch.int32, device=k.device) * rows
        ends = begins + self.cu_seqlens_k.diff().clamp(max=rows)
        cu_seqlens_k = torch.cat([torch.stack([begins, ends], 1).flatten(), begins[-1:] + rows])
        cu_seqlens_q = self.cu_seqlens_q.repeat_interleave(2, output_size=2 * self.batch + 2)[1:]
        q_starts = None if self.q_starts is None else self.q_starts.repeat_interleave(2)
        return self._replace(
            k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_starts=q_starts, block_table=None
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, varlen: bool) -> None:
    """Raise TypeError or ValueError, naming the argument, unless q, k and v fit together."""
    # Each attribute of a tensor is asked for once: together they are a good part of a call's time on the host.
    ndim, layout = (3, "(total, heads, head_dim)") if varlen else (4, "(batch, seqlen, heads, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        shape, dtype, device = x.shape, x.dtype, x.device
        if len(shape) != ndim:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(shape)}")
        if dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
        if shape[-1] < 1 or shape[-2] < 1:
            raise ValueError(f"{name} needs at least one head and head_dim >= 1, got shape {tuple(shape)}")
        strides = x.stride()
        if strides[-1] != 1 and shape[-1] > 1:
            raise ValueError(f"{name} must have stride 1 in head_dim, got strides {strides}; call .contiguous()")
        if name == "q":
            q_shape, q_dtype, q_device = shape, dtype, device
            continue
        if dtype != q_dtype:
            raise TypeError(f"{name} must have q's dtype {q_dtype}, got {dtype}")
        if device != q_device:
            raise ValueError(f"{name} must be on q's device {q_device}, got {device}")
        if name == "k":
            k_shape = shape
        elif shape != k_shape:
            raise ValueError(f"k and v must have one shape, got {tuple(k_shape)} and {tuple(shape)}")
    if q_shape[-1] != k_shape[-1]:
        raise ValueError(f"q and k must have one head_dim, got {q_shape[-1]} and {k_shape[-1]}")
    if not varlen and q_shape[0] != k_shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q_shape[0]} and {k_shape[0]}")
    if q_shape[-2] % k_shape[-2] != 0:
        raise ValueError(f"q heads ({q_shape[-2]}) must be a multiple of kv heads ({k_shape[-2]})")


def check_pages(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, batch: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless k and v are pools of pages for packed queries."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[0] < 1 or x.shape[1] < 1:
            raise ValueError(
                f"{name} must be (pages, page_size, kv_heads, head_dim) with a block_table, got shape {tuple(x.shape)}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    check_qkv(q, k[0], v[0], varlen=True)
    if not isinstance(block_table, Tensor) or block_table.dtype != torch.int32:
        raise TypeError(f"block_table must be an int32 tensor (batch, pages), got {block_table!r}")
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.shape[1] < 1:
        raise ValueError(f"block_table must be ({batch}, at least 1), got shape {tuple(block_table.shape)}")
    if block_table.device != q.device or not block_table.is_contiguous():
        raise ValueError(f"block_table must be contiguous and on {q.device}, got it on {block_table.device}")


def check_pattern(pattern: AttentionPattern | BlockMask, q: Tensor, q_end: int, k_end: int) -> None:
    """Raise unless the pattern can serve q's heads and device and positions up to `q_end` and `k_end`."""
    if not isinstance(pattern, AttentionPattern | BlockMask):
        raise TypeError(f"pattern must be an AttentionPattern or a BlockMask, got {type(pattern).__name__}")
    for name, end in (("query", q_end), ("key", k_end)):
        if end > MAX_POSITION:
            raise ValueError(f"{name} positions must stay below {MAX_POSITION}, got up to {end}")
    if not isinstance(pattern, BlockMask):
        return
    if q.shape[-2] % pattern.heads != 0:
        raise ValueError(f"pattern: the block mask's {pattern.heads} heads must divide q's {q.shape[-2]} heads")
    if pattern.device != q.device:
        raise ValueError(f"pattern: the block mask is on {pattern.device}, q on {q.device}; use pattern.to(...)")
    covers_q, covers_k = pattern.q_blocks * pattern.block_size, pattern.k_blocks * pattern.block_size
    if q_end > covers_q or k_end > covers_k:
        raise ValueError(
            f"pattern: the block mask covers {covers_q} query and {covers_k} key positions, "
            f"the call needs {q_end} and {k_end}"
        )


def checked_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The softmax scale, by default head_dim ** -0.5; must be positive and finite."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, int | float):
        raise TypeError(f"softmax_scale must be a float or None, got {type(softmax_scale).__name__}")
    if not (softmax_scale > 0 and math.isfinite(softmax_scale)):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    return float(softmax_scale)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Raise unless `cu_seqlens` is an int32 (batch + 1,) tensor beside q. Its values stay on the device, unread."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must be (batch + 1,) with batch >= 1, got shape {tuple(cu_seqlens.shape)}")
    if not cu_seqlens.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {cu_seqlens.stride()}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {cu_seqlens.device}")
