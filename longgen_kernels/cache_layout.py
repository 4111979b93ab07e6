"""Where a KV cache keeps each token: arithmetic on positions, the same in Python and in the kernels.

A token is *permanent* (sink, or in a strided block of its KV head) or *recent*. A compact cache has `ring` slots for
the recent tokens, position `j` at `j % ring`, and behind them one slot for each permanent token, in order of position.
No token ever moves, and nothing has to be stored beside a sequence's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longgen_kernels.patterns import MAX_POSITION, AttentionPattern, BlockMask

# Sink and ring are whole multiples of this many tokens, so that a kernel may read as many neighbours at once.
GRANULE = 16
# Query tokens that may be appended and attend in one call: the ring has room for as many beyond the window.
MAX_QUERY_TOKENS = 16


@dataclass(frozen=True)
class CacheLayout:
    """The slots of one sequence in a cache under `pattern`; `ring` is None where each token's slot is its position.

    >>> layout = CacheLayout.compact(AttentionPattern.sink_window(sink=128, window=2048))
    >>> layout.ring, layout.slots(131072, kv_heads=32)
    (2064, 2192)
    """

    pattern: AttentionPattern
    ring: int | None = None

    @classmethod
    def compact(
        cls, pattern: AttentionPattern | BlockMask, max_seqlen: int = MAX_POSITION, granule: int = GRANULE
    ) -> CacheLayout:
        """The layout that keeps only what a later query can still see.

        Args:
            pattern: a causal arithmetic pattern. A dense one keeps everything.
            max_seqlen: tokens of the longest sequence; no ring is larger than that.
            granule: the ring is a multiple of this many tokens (a multiple of 16): the size of a page.

        Raises:
            TypeError: `pattern` is no pattern.
            NotImplementedError: the pattern may show a key again that it has hidden before.
        """
        if not isinstance(pattern, AttentionPattern | BlockMask):
            raise TypeError(f"pattern must be an AttentionPattern, got {type(pattern).__name__}")
        if isinstance(pattern, BlockMask) or not pattern.is_cache_friendly:
            raise NotImplementedError(
                f"a KV cache drops what no later query sees; a {type(pattern).__name__} "
                f"{'may show any key block again' if isinstance(pattern, BlockMask) else 'that is bidirectional'}"
                ", so nothing could be dropped"
            )
        window = _window_tokens(pattern)
        # The last of 16 query tokens must not overwrite what the first of them still sees.
        needed = 0 if pattern.is_dense or window == 0 else min(window + MAX_QUERY_TOKENS - 1, max_seqlen)
        return cls(pattern, _round_up(needed, granule))

    @property
    def is_compact(self) -> bool:
        """Whether permanent tokens have slots by rank, behind a ring, which may have none."""
        return self.ring is not None

    @property
    def keeps_everything(self) -> bool:
        """True where each token's slot is its position: nothing is ever overwritten."""
        return self.ring is None or self.pattern.is_dense

    @property
    def window_tokens(self) -> int:
        """The most tokens that the window alone shows a query."""
        return _window_tokens(self.pattern)

    @property
    def sink_slots(self) -> int:
        """Tokens from the start that are permanent: the sink, rounded up; everything under a dense pattern."""
        return MAX_POSITION if self.pattern.is_dense else _round_up(self.pattern.sink, GRANULE)

    @property
    def max_crop(self) -> int | None:
        """How many tokens may be dropped from the end and still leave all that the next query sees; None: all."""
        if self.ring is None or self.ring == 0:
            return None
        return self.ring - self.window_tokens + 1

    def first_block(self, head: int) -> int:
        """The first strided block that has permanent slots of its own: earlier ones lie in the sink."""
        stride, shift = self._stride, self._log2_block
        low = self.sink_slots >> shift
        return low + (-low - self.pattern.phase(head)) % stride

    def permanent_slots(self, end: int, head: int) -> int:
        """Slots of the permanent tokens among the first `end`."""
        if self.pattern.stride is None or end <= self.sink_slots:
            return min(end, self.sink_slots)
        shift, first = self._log2_block, self.first_block(head)
        blocks = max(0, -(-(-(-end >> shift) - first) // self._stride))
        if blocks == 0:
            return self.sink_slots
        overhang = max(((first + (blocks - 1) * self._stride + 1) << shift) - end, 0)
        return self.sink_slots + (blocks << shift) - overhang

    def slots(self, max_seqlen: int, kv_heads: int) -> int:
        """Slots a KV head of one sequence of up to `max_seqlen` tokens."""
        if self.ring is None:
            return max_seqlen
        phases = min(kv_heads, self._stride)  # the phases of further heads repeat
        permanent = max(self.permanent_slots(max_seqlen, head) for head in range(phases))
        return self.ring + _round_up(permanent, GRANULE)

    # -- elementwise, on tensors --------------------------------------------------------------------------------------

    def is_permanent(self, position: Tensor, head: Tensor) -> Tensor:
        """Whether a token stays for good."""
        permanent = position < self.sink_slots
        if self.pattern.stride is None:
            return permanent
        phase = self.pattern.head_phase_offset + self.pattern.head_phase_step * head
        return permanent | (((position >> self._log2_block) + phase) % self._stride == 0)

    def slot(self, position: Tensor, head: Tensor) -> Tensor:
        """The slot of the token at `position` in a KV head; -1 where it is not kept at all."""
        position = position + torch.zeros_like(head)
        if self.ring is None:
            return position
        recent = position % self.ring if self.ring else torch.full_like(position, -1)
        permanent = self.ring + position
        if self.pattern.stride is not None:
            shift = self._log2_block
            rank = ((position >> shift) - self._first_blocks(head)) // self._stride
            strided = self.ring + self.sink_slots + (rank << shift) + (position & ((1 << shift) - 1))
            permanent = torch.where(position < self.sink_slots, permanent, strided)
        return torch.where(self.is_permanent(position, head), permanent, recent)

    def positions(self, end: Tensor, head: Tensor, slots: int) -> Tensor:
        """Which token each of `slots` slots holds in a sequence of `end` tokens: -1 for none; the inverse of `slot`.

        `end` and `head` are broadcastable integer tensors; the result has one more dimension, of the slots. What the
        ring still holds of tokens that the window has passed, or that were cropped, is counted too.
        """
        end, head = end.long()[..., None], head.long()[..., None]
        slot = torch.arange(slots, device=end.device)
        if self.ring is None:
            return torch.where(slot < end, slot, -1) + torch.zeros_like(head)
        index = slot[self.ring :] - self.ring
        if self.pattern.stride is None:
            position = index + torch.zeros_like(head)
            here = index < self.sink_slots
        else:
            shift = self._log2_block
            strided = index - self.sink_slots
            block = self._first_blocks(head) + (strided >> shift) * self._stride
            strided = (block << shift) + (strided & ((1 << shift) - 1))
            position = torch.where(index < self.sink_slots, index, strided)
            here = (index < self.sink_slots) | (position >= self.sink_slots)
        permanent = torch.where(here & (position < end), position, -1)
        if self.ring == 0:
            return permanent
        recent = end - 1 - (end - 1 - slot[: self.ring]) % self.ring
        recent = torch.where((recent >= 0) & ~self.is_permanent(recent, head), recent, -1)
        recent, permanent = (
            x.expand(*torch.broadcast_shapes(end.shape, head.shape)[:-1], -1) for x in (recent, permanent)
        )
        return torch.cat([recent, permanent], dim=-1)

    def _first_blocks(self, head: Tensor) -> Tensor:
        low = self.sink_slots >> self._log2_block
        phase = self.pattern.head_phase_offset + self.pattern.head_phase_step * head
        return low + (-low - phase) % self._stride

    @property
    def _stride(self) -> int:
        return self.pattern.stride or 1

    @property
    def _log2_block(self) -> int:
        return (self.pattern.block_size or 1).bit_length() - 1


def _window_tokens(pattern: AttentionPattern) -> int:
    if pattern.window_blocks is not None and pattern.block_size is not None:
        return pattern.window_blocks * pattern.block_size
    return pattern.window or 0


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
