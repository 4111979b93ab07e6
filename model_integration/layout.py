"""Which sequence each token of a batch belongs to, and where it stands in it.

Padding, packing and caches differ only in this. Whatever implementation computes the attention, its mask comes from
one `SequenceLayout`, so that the implementation decides the speed and never the meaning: position 0 of a pattern is the
first real token of each sequence, wherever padding or packing has put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longgen_kernels import AttentionPattern


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The sequences in one forward pass.

    Attributes:
        q_length: tokens of this pass in each row.
        kv_length: slots of keys in each row, the cached ones included.
        seen: tokens that the cache held before this pass.
        padding: (batch, kv_length) bool, True for a real token; None when every slot a query may reach is real.
        cu_seq_lens: (sequences + 1,) int32 boundaries of packed sequences in the flattened (batch * q_length) tokens;
            None when each row is one sequence. Never together with `padding`.
        max_length: the longest packed sequence.
    """

    q_length: int
    kv_length: int
    seen: int = 0
    padding: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    max_length: int = 0

    @classmethod
    def of(
        cls,
        batch_size: int,
        q_length: int,
        *,
        kv_length: int | None = None,
        seen: int = 0,
        device: torch.device | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        max_length: int | None = None,
    ) -> SequenceLayout:
        """Read the layout from a model's arguments; raise ValueError for a combination that has no clear meaning.

        Packed sequences come from `cu_seq_lens`, or from `position_ids` that do not rise by one. A caller who knows
        that his position ids are plain passes None, which saves a host synchronisation; so does a missing mask.
        """
        kv_length = seen + q_length if kv_length is None else kv_length
        attention_mask = checked_mask(attention_mask, seen, q_length, device)
        if cu_seq_lens is not None:
            return cls._packed(batch_size, q_length, kv_length, seen, attention_mask, cu_seq_lens, max_length)
        if attention_mask is None and kv_length != seen + q_length:  # a static cache: its last slots are still free
            attention_mask = torch.ones(batch_size, seen + q_length, dtype=torch.bool, device=device)
        padding = None if attention_mask is None else _needed_padding(attention_mask, kv_length, seen)
        if position_ids is not None and q_length > 1:
            jumps = position_jumps(position_ids.expand(batch_size, -1), padding, seen)
            if jumps.any():
                if padding is not None or seen:
                    raise ValueError(
                        "packed sequences (position_ids that restart) need rows without left padding and an empty cache"
                    )
                starts = jumps.clone()
                starts[:, 0] = True
                bounds = starts.flatten().nonzero().flatten()
                total = bounds.new_tensor([batch_size * q_length])
                return cls._packed(batch_size, q_length, kv_length, seen, None, torch.cat([bounds, total]), None)
        return cls(q_length, kv_length, seen, padding)

    @classmethod
    def _packed(
        cls,
        batch_size: int,
        q_length: int,
        kv_length: int,
        seen: int,
        attention_mask: Tensor | None,
        cu_seq_lens: Tensor,
        max_length: int | None,
    ) -> SequenceLayout:
        if seen or kv_length != q_length:
            raise ValueError("packed sequences need an empty, growing cache or none")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("cu_seq_lens_q and an attention_mask with padding exclude each other")
        if int(cu_seq_lens[-1]) != batch_size * q_length:
            raise ValueError(
                f"cu_seq_lens_q ends at {int(cu_seq_lens[-1])}, but there are {batch_size * q_length} tokens"
            )
        longest = int(cu_seq_lens.diff().max()) if max_length is None else int(max_length)
        return cls(q_length, kv_length, 0, None, cu_seq_lens.to(torch.int32), longest)

    @property
    def is_plain(self) -> bool:
        """True when each row is one sequence that fills all slots: query i of a row stands at position seen + i."""
        return self.padding is None and self.cu_seq_lens is None

    @cached_property
    def unpad(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
        """For rows with padding: how to gather the real tokens into a packed batch, and its boundaries.

        Returns (indices of the real queries in (batch * q_length), indices of the real keys in (batch * kv_length),
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k).
        """
        assert self.padding is not None
        queries = self.padding[:, self.seen : self.seen + self.q_length]
        lengths_q, lengths_k = queries.sum(1, dtype=torch.int32), self.padding.sum(1, dtype=torch.int32)
        cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0, dtype=torch.int32), (1, 0)) for n in (lengths_q, lengths_k))
        gather_q, gather_k = (m.flatten().nonzero().flatten() for m in (queries, self.padding))
        return gather_q, gather_k, cu_q, cu_k, int(lengths_q.max()), int(lengths_k.max())

    def sequences_and_positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sequence that each key slot belongs to, -1 for padding, and its position there.

        Both are int64 of (batch, kv_length), or of (1, kv_length) when all rows are alike. Padding counts as a
        sequence of its own, in which a token sees itself: a row of a softmax must not be empty.
        """
        slots = torch.arange(self.kv_length, device=device)[None]
        if self.cu_seq_lens is not None:
            bounds = self.cu_seq_lens.to(device=device, dtype=torch.int64)
            token = torch.arange(int(bounds[-1]), device=device)
            sequence = torch.searchsorted(bounds, token, right=True) - 1
            position = token - bounds[sequence]
            return sequence.view(-1, self.q_length), position.view(-1, self.q_length)
        if self.padding is None:
            return torch.zeros_like(slots), slots
        real = self.padding.to(device)
        return torch.where(real, 0, -1), torch.where(real, real.cumsum(1) - 1, slots)

    def visible(self, pattern: AttentionPattern, heads: int, kv_heads: int, device: torch.device) -> Tensor:
        """Which key slots each query sees: bool, (batch or 1, heads or 1, q_length, kv_length)."""
        sequence, position = self.sequences_and_positions(device)
        now = slice(self.seen, self.seen + self.q_length)
        kv_head = torch.arange(heads if pattern.head_phase_step else 1, device=device) // (heads // kv_heads)
        inside = sequence[:, None, now, None] == sequence[:, None, None, :]
        return inside & pattern.is_visible(
            position[:, None, now, None], position[:, None, None, :], kv_head[None, :, None, None]
        )


def checked_mask(attention_mask: Tensor | None, seen: int, q_length: int, device: torch.device | None) -> Tensor | None:
    """A model's attention_mask as bool (batch, seen + q_length) on `device`; ValueError for other shapes."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be 2-D (batch, tokens), got shape {tuple(attention_mask.shape)}: "
            "every layer's own mask is made from it and the layer's pattern"
        )
    if attention_mask.shape[1] != seen + q_length:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; "
            f"{seen} cached and {q_length} new tokens need {seen + q_length}"
        )
    return attention_mask.to(device=device, dtype=torch.bool)


def _needed_padding(real: Tensor, kv_length: int, seen: int) -> Tensor | None:
    """The mask as (batch, kv_length) bool, or None where causality alone already hides all that is not real."""
    if kv_length == real.shape[1]:
        # Padding on the right comes after every real query of a prefill, which never sees it.
        harmless = ~(real[:, 1:] & ~real[:, :-1]).any() if seen == 0 else real.all()
        return None if harmless else real
    return torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))


def position_jumps(position_ids: Tensor, padding: Tensor | None, seen: int) -> Tensor:
    """(batch, q_length) bool: real tokens whose position id does not follow that of the real token before them."""
    if padding is None:
        return torch.diff(position_ids, dim=1, prepend=position_ids[:, :1] - 1) != 1
    real = padding[:, seen : seen + position_ids.shape[1]]
    offset = position_ids - real.cumsum(1)
    first = torch.gather(offset, 1, real.int().argmax(1, keepdim=True))
    return real & (offset != first)
