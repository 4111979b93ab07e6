"""One rank's part of a sequence-parallel forward pass, as the model and its attention function get it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longgen_kernels import AttentionPattern
from model_integration.configuration import LongGenConfig
from model_integration.context_parallel.heads import attend_by_heads
from model_integration.context_parallel.keys import attend_by_keys
from model_integration.context_parallel.sharding import Sharding
from model_integration.context_parallel.traffic import bytes_by_heads, bytes_by_keys

EXCHANGES = ("auto", "heads", "keys")

#: RoPE types whose frequencies depend on the longest position of a call, which ranks would see differently.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@lru_cache(maxsize=16)
def cheaper_exchange(
    sharding: Sharding, pattern: AttentionPattern, heads: int, kv_heads: int, device: torch.device | None = None
) -> str:
    """What "auto" takes: for dense attention heads, whose work is even; for a sparse pattern what sends less.

    With fewer query heads than ranks only keys are left.

    >>> sharding = Sharding.of(1, 131072, 8)
    >>> cheaper_exchange(sharding, AttentionPattern.causal(), 32, 8)
    'heads'
    >>> cheaper_exchange(sharding, AttentionPattern.sink_window(128, 2048), 32, 8)
    'keys'
    """
    if heads < sharding.ranks:
        return "keys"
    if pattern.is_dense:
        return "heads"
    by_keys, by_heads = (
        bytes_by_keys(sharding, pattern, kv_heads, 1, device),
        bytes_by_heads(sharding, heads, kv_heads, 1),
    )
    return "keys" if by_keys < by_heads else "heads"


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """A rank's part of every sequence in one forward pass, handed to the model as `sequence_shard`.

        shard = SequenceShard.of(group, batch_size, length)
        model(input_ids=shard.local(input_ids), sequence_shard=shard)

    Attention alone needs other ranks' tokens; around it a shard is a batch like any other. Losses and gradients of the
    ranks add up to those of the whole batch: sum both over the group. Labels are shifted before they are sharded, since
    a shard's last token predicts the next shard's first.

    Attributes:
        sharding: which tokens each rank holds.
        group: the ranks that share the sequences; all of them run the same forward and backward passes.
        exchange: "heads" (all-to-all, DeepSpeed-Ulysses), "keys" (only those that the pattern shows), or "auto", which
            takes heads in full layers and in sparse ones whatever sends less.
    """

    sharding: Sharding
    group: dist.ProcessGroup
    exchange: str = "auto"

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        batch_size: int,
        length: int,
        *,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        exchange: str = "auto",
    ) -> SequenceShard:
        """The calling rank's shard of a batch (batch_size, length), packed documents as the model takes them.

        Args:
            position_ids: (batch_size or 1, length) of the whole batch; a document begins where they do not rise by one.
            cu_seq_lens: (documents + 1,) boundaries in the flattened batch, instead.

        Raises ValueError for an unknown exchange, fewer columns than ranks, and documents that cross rows.
        """
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}; got {exchange!r}")
        sharding = Sharding.of(batch_size, length, group.size(), position_ids=position_ids, cu_seq_lens=cu_seq_lens)
        return cls(sharding, group, exchange)

    @property
    def rank(self) -> int:
        """The calling rank in the group."""
        return self.group.rank()

    def local(self, x: Tensor) -> Tensor:
        """This rank's columns of a tensor of the whole batch, (batch, length, ...); contiguous."""
        return x[:, self.sharding.bounds[self.rank] : self.sharding.bounds[self.rank + 1]].contiguous()

    def position_ids(self, device: torch.device | None = None) -> Tensor:
        """(batch, tokens) int64: where this rank's tokens stand in their documents."""
        return self.sharding.position_ids(self.rank, device)

    def exchange_for(
        self, pattern: AttentionPattern, heads: int, kv_heads: int, device: torch.device | None = None
    ) -> str:
        """The exchange of layers with this pattern: "heads" or "keys"."""
        if self.exchange != "auto":
            return self.exchange
        return cheaper_exchange(self.sharding, pattern, heads, kv_heads, device)

    def check(self, config: LongGenConfig, batch_size: int, tokens: int, **others: object) -> None:
        """Raise ValueError or NotImplementedError unless a model of this config can run the shard.

        Args:
            batch_size, tokens: shape of the batch that the model got.
            others: its arguments that a shard excludes, by name.
        """
        expected = (self.sharding.batch, self.sharding.tokens(self.rank))
        if (batch_size, tokens) != expected:
            raise ValueError(
                f"rank {self.rank} of sequence_shard holds {expected} (batch, tokens), got {(batch_size, tokens)}: "
                "pass sequence_shard.local(input_ids)"
            )
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(
                f"sequence_shard excludes {', '.join(given)}: it has no padding and no cache, and says itself where "
                "packed documents begin"
            )
        rope_type = (config.rope_parameters or {}).get("rope_type")
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise NotImplementedError(
                f"sequence_shard with rope_type={rope_type!r}: its frequencies depend on a length that no rank sees"
            )

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of one layer under `module.pattern`, over this rank's queries and every rank's keys.

        q (batch, tokens, heads, head_dim), k and v (batch, tokens, kv_heads, head_dim), after RoPE; returns like q.
        """
        pattern: AttentionPattern = module.pattern  # type: ignore[assignment]
        by_keys = self.exchange_for(pattern, q.shape[2], k.shape[2], q.device) == "keys"
        attend = attend_by_keys if by_keys else attend_by_heads
        return attend(self.sharding, self.rank, self.group, q, k, v, pattern, scale)
