"""Arbitrary block masks, held as compact index lists on the device that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.patterns.base import Pattern, checked_block_size

MAX_BLOCKS = 1 << 31  # the index lists are int32
MIN_BLOCK = 16  # smaller blocks would starve every matrix unit; masks finer than this are not block masks


@dataclass(frozen=True, eq=False)
class BlockMask(Pattern):
    """Which key blocks each query block sees, per head.

    Block `i` holds the positions [i * block_size, (i + 1) * block_size). With `is_causal` the blocks above the
    diagonal are dropped and the diagonal ones are masked token by token. Positions beyond the mask see nothing; the
    attention functions refuse sequences that are longer than the mask.

    Build one with `from_dense` or `from_csr`. The heads of the mask divide the query heads: 1 head is shared by all,
    one per KV head or one per query head are the usual choices.

    Attributes:
        rows: int32 (heads * q_blocks + 1 + capacity,): CSR row offsets, then the key blocks of each row, ascending.
        cols: int32 (heads * k_blocks + 1 + capacity,): the transpose, for the backward pass.
        heads, q_blocks, k_blocks, block_size, is_causal: plain Python values.

    >>> mask = BlockMask.from_dense(torch.eye(4, dtype=torch.bool)[None], block_size=64)
    >>> mask.visible_pairs(256)
    8320
    """

    rows: Tensor
    cols: Tensor
    heads: int
    q_blocks: int
    k_blocks: int
    block_size: int
    is_causal: bool

    @classmethod
    def from_dense(
        cls, mask: Tensor, block_size: int, *, is_causal: bool = True, max_blocks: int | None = None
    ) -> BlockMask:
        """Build from a bool tensor (heads, q_blocks, k_blocks) or (q_blocks, k_blocks).

        On a GPU nothing waits for the device, so the lists are sized for the worst case unless `max_blocks`, an upper
        bound on the number of True entries, is given (entries beyond it would be lost, so it is the caller's promise).

        Raises TypeError for a mask that is not bool, ValueError for other shapes or a block size that is not a power
        of two of at least 16.
        """
        name = "BlockMask"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: mask must be a bool tensor, got {got}")
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim != 3 or mask.numel() == 0:
            raise ValueError(f"{name}: mask must be (heads, q_blocks, k_blocks), none of them 0; got {mask.shape}")
        if mask.numel() >= MAX_BLOCKS:
            raise ValueError(f"{name}: a mask must have less than {MAX_BLOCKS} blocks, got {mask.shape}")
        if checked_block_size(name, block_size) < MIN_BLOCK:
            raise ValueError(f"{name}: block_size must be at least {MIN_BLOCK}, got {block_size}")
        heads, q_blocks, k_blocks = mask.shape
        if is_causal:
            mask = mask.tril()
        if max_blocks is None:
            max_blocks = mask.numel() if mask.is_cuda else int(mask.sum())
        return cls(
            rows=_compress(mask, max_blocks),
            cols=_compress(mask.transpose(1, 2), max_blocks),
            heads=heads,
            q_blocks=q_blocks,
            k_blocks=k_blocks,
            block_size=block_size,
            is_causal=bool(is_causal),
        )

    @classmethod
    def from_csr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        k_blocks: int,
        block_size: int,
        *,
        is_causal: bool = True,
    ) -> BlockMask:
        """Build from CSR: `indptr` (heads, q_blocks + 1) with one run over `indices` (nnz,), in any integer dtype.

        `indptr[h, i]:indptr[h, i + 1]` are the entries of `indices` that row `i` of head `h` holds, in any order.
        The contents are checked, which waits for the device. Raises ValueError naming what is wrong.
        """
        name = "BlockMask.from_csr"
        for what, tensor in (("indptr", indptr), ("indices", indices)):
            if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise TypeError(f"{name}: {what} must be an integer tensor")
        if indptr.ndim == 1:
            indptr = indptr[None]
        if indptr.ndim != 2 or indptr.shape[1] < 2 or indices.ndim != 1:
            raise ValueError(
                f"{name}: indptr must be (heads, q_blocks + 1) and indices (nnz,); got {indptr.shape}, {indices.shape}"
            )
        if indptr.device != indices.device:
            raise ValueError(f"{name}: indptr is on {indptr.device}, indices on {indices.device}")
        indptr, indices = indptr.long(), indices.long()
        counts = indptr.diff(dim=1)
        contiguous = bool((indptr[1:, 0] == indptr[:-1, -1]).all())
        if int(indptr[0, 0]) != 0 or int(indptr[-1, -1]) != indices.numel() or not contiguous:
            raise ValueError(f"{name}: indptr must run from 0 to nnz={indices.numel()} without gaps over the heads")
        if int(counts.min()) < 0:
            raise ValueError(f"{name}: indptr must not decrease")
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= k_blocks):
            raise ValueError(
                f"{name}: indices must be in [0, {k_blocks}), got {int(indices.min())}..{int(indices.max())}"
            )
        heads, q_blocks = counts.shape
        row = torch.repeat_interleave(counts.flatten(), output_size=indices.numel())
        mask = torch.zeros(heads * q_blocks, k_blocks, dtype=torch.bool, device=indptr.device)
        mask[row, indices] = True
        mask = mask.view(heads, q_blocks, k_blocks)
        return cls.from_dense(mask, block_size, is_causal=is_causal, max_blocks=indices.numel())

    @property
    def causal_only(self) -> bool:
        return self.is_causal

    @property
    def is_dense(self) -> bool:
        """False: a block mask is never treated as dense, whatever it holds."""
        return False

    @property
    def is_cache_friendly(self) -> bool:
        """False: a later query block may see any key block again, so a KV cache may drop nothing."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the index lists live; attention needs them beside q, k and v."""
        return self.rows.device

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        return BlockMask(
            self.rows.to(device),
            self.cols.to(device),
            self.heads,
            self.q_blocks,
            self.k_blocks,
            self.block_size,
            self.is_causal,
        )

    def to_dense(self) -> Tensor:
        """The bool tensor (heads, q_blocks, k_blocks) that the lists stand for; waits for the device."""
        n_rows = self.heads * self.q_blocks
        indptr = self.rows[: n_rows + 1].long()
        nnz = int(indptr[-1])
        row = torch.repeat_interleave(indptr.diff(), output_size=nnz)
        mask = torch.zeros(n_rows, self.k_blocks, dtype=torch.bool, device=self.device)
        mask[row, self.rows[n_rows + 1 : n_rows + 1 + nnz].long()] = True
        return mask.view(self.heads, self.q_blocks, self.k_blocks)

    def is_visible(self, q_pos: Tensor, k_pos: Tensor, head: int | Tensor = 0) -> Tensor:
        mask = self.to_dense().to(q_pos.device)
        q_block, k_block = q_pos // self.block_size, k_pos // self.block_size
        inside = (q_block >= 0) & (q_block < self.q_blocks) & (k_block >= 0) & (k_block < self.k_blocks)
        seen = mask[head, q_block.clamp(0, self.q_blocks - 1), k_block.clamp(0, self.k_blocks - 1)] & inside
        return seen & (k_pos <= q_pos) if self.is_causal else seen

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of JSON types (CSR lists)."""
        dense = self.to_dense().cpu()
        counts = torch.cat([torch.zeros(1, dtype=torch.long), dense.flatten(0, 1).sum(-1).cumsum(0)])
        starts = torch.arange(self.heads)[:, None] * self.q_blocks + torch.arange(self.q_blocks + 1)
        return {
            "kind": "block_mask",
            "indptr": counts[starts].tolist(),
            "indices": dense.nonzero()[:, 2].tolist(),
            "k_blocks": self.k_blocks,
            "block_size": self.block_size,
            "is_causal": self.is_causal,
        }

    def encode(self) -> list[int]:
        """The mask's sizes as the ints that a torch operator's schema can carry; read back by `decode_pattern`."""
        return [1, int(self.is_causal), self.heads, self.q_blocks, self.k_blocks, self.block_size, 0, 0, 0]


def _compress(mask: Tensor, capacity: int) -> Tensor:
    """Row offsets and column indices of a bool (heads, rows, cols) mask in one int32 tensor, without a host sync."""
    heads, rows, cols = mask.shape
    flat = mask.reshape(-1)
    ends = flat.cumsum(0, dtype=torch.int32)
    offset = heads * rows + 1
    # Entries that are not set all land in one slot past the lists, which is cut off.
    packed = torch.zeros(offset + capacity + 1, dtype=torch.int32, device=mask.device)
    packed[1:offset] = ends[cols - 1 :: cols]
    slot = torch.where(flat, ends - 1, capacity).clamp_(max=capacity) + offset
    column = torch.arange(cols, dtype=torch.int32, device=mask.device).repeat(heads * rows)
    packed.scatter_(0, slot.long(), column)
    return packed[:-1]
