"""Patterns that arithmetic on positions describes: no mask is ever stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longgen_kernels.patterns.base import Pattern, checked_block_size, checked_int


@dataclass(frozen=True, slots=True)
class AttentionPattern(Pattern):
    """Sink, sliding window and strided blocks; dense causal and dense bidirectional as special cases.

    Key `j` is visible to query position `p` in KV head `h` when `j <= p` and any of these holds:

    - `j < sink`
    - `p - j < window` (tokens), or `p // block_size - j // block_size < window_blocks`
    - `(j // block_size + head_phase_offset + head_phase_step * h) % stride == 0`

    With neither `window` nor `window_blocks` nor `stride` the pattern is dense. Build one with the named constructors
    `causal`, `bidirectional`, `sink_window` and `strided`. Instances are hashable and compare by value.

    Source: LongGen (Ge et al., ICLR 2025, arXiv 2410.01485); block-aligned windows and per-head phases as in
    S2-Attention (arXiv 2407.17678).

    >>> AttentionPattern.sink_window(sink=128, window=2048).kept_tokens(131072)
    2176
    """

    is_causal: bool = True
    sink: int = 0
    window: int | None = None
    window_blocks: int | None = None
    stride: int | None = None
    block_size: int | None = None
    head_phase_step: int = 0
    head_phase_offset: int = 0

    def __post_init__(self) -> None:
        name = "AttentionPattern"
        if not isinstance(self.is_causal, bool):
            raise TypeError(f"{name}: is_causal must be a bool, got {self.is_causal!r}")
        checked_int(name, "sink", self.sink, 0)
        if self.window is not None:
            checked_int(name, "window", self.window, 0)
        if self.window_blocks is not None:
            checked_int(name, "window_blocks", self.window_blocks, 0)
        if self.window is not None and self.window_blocks is not None:
            raise ValueError(
                f"{name}: give window (tokens) or window_blocks, not both; "
                f"got window={self.window}, window_blocks={self.window_blocks}"
            )
        limited = self.window is not None or self.window_blocks is not None
        if self.stride is not None:
            checked_int(name, "stride", self.stride, 1, 1 << 20)
            if not limited:
                raise ValueError(f"{name}: strided blocks need a window or window_blocks (0 for none)")
        if self.sink and not limited:
            raise ValueError(f"{name}: a sink of {self.sink} needs a window or window_blocks (0 for none)")
        if limited and not self.is_causal:
            raise ValueError(f"{name}: windows, sinks and strides are causal; is_causal=False is dense only")
        needs_block = self.window_blocks is not None or self.stride is not None
        if needs_block:
            checked_block_size(name, self.block_size)
            if self.window_blocks is not None and self.block_size is not None:
                checked_int(name, "window_blocks * block_size", self.window_blocks * self.block_size, 0)
        elif self.block_size is not None:
            raise ValueError(f"{name}: block_size={self.block_size} has no effect without window_blocks or stride")
        checked_int(name, "head_phase_step", self.head_phase_step, 0)
        checked_int(name, "head_phase_offset", self.head_phase_offset, 0)
        if self.stride is None and (self.head_phase_step or self.head_phase_offset):
            raise ValueError(f"{name}: head phases have no effect without stride")

    # -- constructors ---------------------------------------------------------------------------------------------

    @classmethod
    def causal(cls) -> AttentionPattern:
        """Every earlier key and the token itself."""
        return cls()

    @classmethod
    def bidirectional(cls) -> AttentionPattern:
        """Every key."""
        return cls(is_causal=False)

    @classmethod
    def sink_window(
        cls,
        sink: int,
        window: int | None = None,
        *,
        window_blocks: int | None = None,
        block_size: int | None = None,
    ) -> AttentionPattern:
        """The first `sink` tokens and a sliding window.

        `window` counts tokens, the query's own included; `window_blocks` of `block_size` tokens (a power of two)
        counts whole blocks, the query's own included. Exactly one of the two is given.

        >>> AttentionPattern.sink_window(sink=0, window_blocks=1, block_size=2).visible(4)[0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        """
        if window is None and window_blocks is None:
            raise ValueError("sink_window: give window (tokens) or window_blocks with block_size")
        return cls(sink=sink, window=window, window_blocks=window_blocks, block_size=block_size)

    @classmethod
    def strided(
        cls,
        stride: int,
        block_size: int,
        *,
        window: int | None = None,
        window_blocks: int | None = None,
        sink: int = 0,
        head_phase_step: int = 1,
        head_phase_offset: int = 0,
    ) -> AttentionPattern:
        """One block of `block_size` tokens in every `stride`, a window, and optionally a sink.

        KV head `h` keeps the blocks `b` with `(b + head_phase_offset + head_phase_step * h) % stride == 0`: a step of
        1 lets the heads cover the whole context together, 0 gives every head the same blocks.

        >>> AttentionPattern.strided(4, 64, window=256).phase(3)
        3
        """
        if window is None and window_blocks is None:
            raise ValueError("strided: give window (tokens) or window_blocks; 0 for none")
        return cls(
            sink=sink,
            window=window,
            window_blocks=window_blocks,
            stride=stride,
            block_size=block_size,
            head_phase_step=head_phase_step,
            head_phase_offset=head_phase_offset,
        )

    def shard_heads(self, first_kv_head: int) -> AttentionPattern:
        """The pattern as a rank sees it whose local KV head 0 is global KV head `first_kv_head`."""
        checked_int("shard_heads", "first_kv_head", first_kv_head, 0)
        fields = asdict(self)
        if self.stride is not None:
            fields["head_phase_offset"] = self.phase(first_kv_head)
        return AttentionPattern(**fields)

    # -- the definition -------------------------------------------------------------------------------------------

    @property
    def causal_only(self) -> bool:
        return self.is_causal

    @property
    def is_dense(self) -> bool:
        """True for `causal()` and `bidirectional()`."""
        return self.window is None and self.window_blocks is None

    @property
    def is_cache_friendly(self) -> bool:
        """True when a key that no query sees any more is never needed again, so that a KV cache may drop it."""
        return self.is_causal

    def phase(self, kv_head: int) -> int:
        """Block offset of the strided blocks in this KV head, in [0, stride)."""
        return (self.head_phase_offset + self.head_phase_step * kv_head) % self.stride if self.stride else 0

    def is_visible(self, q_pos: Tensor, k_pos: Tensor, head: int | Tensor = 0) -> Tensor:
        if not self.is_causal:
            return torch.ones_like(q_pos + k_pos, dtype=torch.bool)
        earlier = k_pos <= q_pos
        if self.is_dense:
            return earlier
        shift = self._log2_block
        if self.window is not None:
            kept = q_pos - k_pos < self.window
        else:
            kept = (q_pos >> shift) - (k_pos >> shift) < (self.window_blocks or 0)
        if self.sink:
            kept = kept | (k_pos < self.sink)
        if self.stride is not None:
            phase = self.head_phase_offset + self.head_phase_step * head
            kept = kept | (((k_pos >> shift) + phase) % self.stride == 0)
        return earlier & kept

    @property
    def _log2_block(self) -> int:
        return 0 if self.block_size is None else self.block_size.bit_length() - 1

    # -- counting -------------------------------------------------------------------------------------------------

    def _visible_keys(self, p: np.ndarray, seqlen_k: int, kv_head: int) -> np.ndarray:
        """How many of the keys [0, seqlen_k) each query position sees, in closed form."""
        end = np.clip(p + 1, 0, seqlen_k) if self.is_causal else np.full_like(p, seqlen_k)
        if self.is_dense:
            return end
        shift = self._log2_block
        if self.window is not None:
            window_lo = p + 1 - self.window
        else:
            window_lo = ((p >> shift) + 1 - (self.window_blocks or 0)) << shift
        window_lo = np.clip(window_lo, 0, end)
        sink_hi = np.minimum(self.sink, window_lo)
        count: np.ndarray = end - window_lo + sink_hi
        if self.stride is not None:
            count = count + self._strided_below(window_lo, kv_head) - self._strided_below(sink_hi, kv_head)
        return count

    def _strided_below(self, position: np.ndarray, kv_head: int) -> np.ndarray:
        """Number of strided tokens at positions [0, position)."""
        assert self.stride is not None and self.block_size is not None
        first = -self.phase(kv_head) % self.stride
        blocks, rest = position >> self._log2_block, position & (self.block_size - 1)
        whole = np.maximum(blocks - first + self.stride - 1, 0) // self.stride
        inside = (blocks >= first) & ((blocks - first) % self.stride == 0)
        counted: np.ndarray = whole * self.block_size + np.where(inside, rest, 0)
        return counted

    def visible_pairs(self, seqlen_q: int, seqlen_k: int | None = None, *, heads: int = 1) -> int:
        """Number of visible (query, key) pairs over KV heads 0 to `heads` - 1, suffix-aligned, in closed form per row.

        >>> AttentionPattern.causal().visible_pairs(1000)
        500500
        """
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        p = np.arange(seqlen_k - seqlen_q, seqlen_k, dtype=np.int64)
        if self.stride is None or self.head_phase_step == 0:
            return heads * int(self._visible_keys(p, seqlen_k, 0).sum())
        return sum(int(self._visible_keys(p, seqlen_k, h).sum()) for h in range(heads))

    def kept_tokens(self, seqlen: int, kv_head: int = 0) -> int:
        """Keys that the last of `seqlen` tokens still sees, its own included: what a KV cache must hold for it."""
        checked_int("kept_tokens", "seqlen", seqlen, 0)
        if seqlen == 0:
            return 0
        return int(self._visible_keys(np.array([seqlen - 1]), seqlen, kv_head)[0])

    # -- plain data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of JSON types; defaults are left out.

        >>> AttentionPattern.sink_window(4, 64).to_dict()
        {'kind': 'arithmetic', 'sink': 4, 'window': 64}
        """
        default = AttentionPattern()
        fields = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        return {"kind": "arithmetic", **fields}

    def encode(self) -> list[int]:
        """The pattern as the ints that a torch operator's schema can carry; read back by `decode_pattern`."""
        return [
            0,
            int(self.is_causal),
            self.sink,
            -1 if self.window is None else self.window,
            -1 if self.window_blocks is None else self.window_blocks,
            self.stride or 0,
            self.block_size or 0,
            self.head_phase_step,
            self.head_phase_offset,
        ]
