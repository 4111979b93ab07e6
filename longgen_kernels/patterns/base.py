"""What every pattern offers, derived from one elementwise predicate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgen_kernels.patterns.plot import plot_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Positions, windows and sinks stay below this, so that 32-bit sums of any two of them cannot overflow in a kernel.
MAX_POSITION = 1 << 30


def checked_int(owner: str, name: str, value: object, low: int, high: int = MAX_POSITION) -> int:
    """Return `value` as an int in [low, high], or raise with the argument's name, its value and the valid range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{owner}: {name} must be in [{low}, {high}], got {value}")
    return value


def checked_block_size(owner: str, value: object) -> int:
    """Return `value` as a power of two, or raise."""
    block_size = checked_int(owner, "block_size", value, 1)
    if block_size & (block_size - 1):
        raise ValueError(f"{owner}: block_size must be a power of two, got {block_size}")
    return block_size


class Pattern(ABC):
    """A set of visible (query position, key position) pairs per head.

    Positions are absolute and start at 0. Everything here follows from `is_visible`, which is the single definition
    that the kernels and the KV cache are tested against.
    """

    @property
    @abstractmethod
    def causal_only(self) -> bool:
        """True when no query sees a later key."""

    @abstractmethod
    def is_visible(self, q_pos: Tensor, k_pos: Tensor, head: int | Tensor = 0) -> Tensor:
        """Elementwise predicate on broadcastable integer tensors: does the query at `q_pos` see the key at `k_pos`?

        Uses elementwise tensor operations only, so it serves as a FlexAttention `mask_mod` too. `head` is the KV head
        for arithmetic patterns and the mask head for block masks.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A plain dict of JSON types, read back by `pattern_from_dict`; made for model configs."""

    def visible(
        self,
        seqlen_q: int,
        seqlen_k: int | None = None,
        *,
        heads: int = 1,
        q_start: int | None = None,
        k_start: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The whole mask, for small shapes: bool (heads, seqlen_q, seqlen_k).

        `seqlen_k` defaults to `seqlen_q`, `q_start` to `k_start + seqlen_k - seqlen_q` (suffix alignment).

        >>> from longgen_kernels import AttentionPattern
        >>> AttentionPattern.sink_window(sink=1, window=2).visible(4)[0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        q_start = k_start + seqlen_k - seqlen_q if q_start is None else q_start
        q_pos = torch.arange(q_start, q_start + seqlen_q, device=device)[:, None]
        k_pos = torch.arange(k_start, k_start + seqlen_k, device=device)[None, :]
        return torch.stack([self.is_visible(q_pos, k_pos, h).expand(seqlen_q, seqlen_k) for h in range(heads)])

    def visible_key_blocks(
        self, q_lo: int, q_hi: int, seqlen_k: int, block_n: int, head: int = 0
    ) -> tuple[list[int], list[int]]:
        """Key blocks of `block_n` tokens that queries at positions [q_lo, q_hi) see: (full, partial) block indices.

        Full means that every query sees every existing key of the block.

        >>> from longgen_kernels import AttentionPattern
        >>> AttentionPattern.sink_window(sink=4, window=8).visible_key_blocks(12, 16, 16, 4)
        ([0, 2], [1, 3])
        """
        mask = self.visible(q_hi - q_lo, seqlen_k, heads=head + 1, q_start=q_lo)[head]
        return _split_blocks(mask, block_n)

    def visible_query_blocks(
        self, k_lo: int, k_hi: int, seqlen_q: int, block_m: int, head: int = 0
    ) -> tuple[list[int], list[int]]:
        """Query blocks of `block_m` positions from 0 to `seqlen_q` that see keys [k_lo, k_hi): (full, partial)."""
        mask = self.visible(seqlen_q, k_hi - k_lo, heads=head + 1, q_start=0, k_start=k_lo)[head]
        return _split_blocks(mask.T, block_m)

    def visible_pairs(self, seqlen_q: int, seqlen_k: int | None = None, *, heads: int = 1) -> int:
        """Number of visible (query, key) pairs, summed over `heads` heads; what useful FLOPs are counted from."""
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        step = max(1, (1 << 24) // max(seqlen_k, 1))
        total = 0
        for row in range(0, seqlen_q, step):
            rows = min(step, seqlen_q - row)
            mask = self.visible(rows, seqlen_k, heads=heads, q_start=seqlen_k - seqlen_q + row)
            total += int(mask.sum())
        return total

    def density(self, seqlen: int, *, heads: int = 1) -> float:
        """Visible pairs over those of the dense pattern (causal or bidirectional) at this length.

        >>> from longgen_kernels import AttentionPattern
        >>> round(AttentionPattern.sink_window(sink=128, window=2048).density(131072), 4)
        0.0329
        """
        checked_int(type(self).__name__, "seqlen", seqlen, 1)
        dense = seqlen * (seqlen + 1) // 2 if self.causal_only else seqlen * seqlen
        return self.visible_pairs(seqlen, heads=heads) / (dense * heads)

    def plot(self, seqlen: int, *, head: int = 0, ax: Axes | None = None) -> Axes:
        """Draw the mask of one head with matplotlib and return the axes; rows are queries, columns keys."""
        mask = self.visible(seqlen, heads=head + 1, device="cpu")[head]
        return plot_mask(mask, f"head {head}: {mask.float().mean():.0%} of all pairs", ax)


def _split_blocks(mask: Tensor, block: int) -> tuple[list[int], list[int]]:
    """Sort the column blocks of a bool (rows, columns) mask into fully and partly visible ones."""
    full, partial = [], []
    for index, lo in enumerate(range(0, mask.shape[1], block)):
        tile = mask[:, lo : lo + block]
        if tile.numel() and bool(tile.all()):
            full.append(index)
        elif bool(tile.any()):
            partial.append(index)
    return full, partial
