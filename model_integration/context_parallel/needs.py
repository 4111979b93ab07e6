"""Which keys of earlier ranks a rank's queries see, read off the pattern's own definition of visible.

For a pattern that is cache friendly - a key that a query does not see is seen by no later one - the queries [start,
stop) of a document see, of the keys before them, only what query `start` sees. What the last query sees too, every
query between does: to those keys attention needs no mask. So the visible keys are a stretch that ends with the run and
begins where the first key goes out of sight, which the pattern masks as ever, and `far` keys before it, wherever they
are, in each KV head others, which all queries see: sinks and strided blocks, and under dense causal attention all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longgen_kernels import AttentionPattern
from model_integration.context_parallel.sharding import Piece, Sharding


@dataclass(frozen=True, eq=False)
class EarlierKeys:
    """The keys before `start` that the queries [start, stop) of one document see.

    Attributes:
        window_start: the keys [window_start, start) are one stretch with the queries' own, masked by the pattern.
        far: bool (kv_heads, window_start), those before that every one of the queries sees; the others none does.
    """

    window_start: int
    far: Tensor

    @classmethod
    def of(
        cls,
        pattern: AttentionPattern,
        start: int,
        stop: int,
        kv_heads: int,
        device: torch.device | None = None,
    ) -> EarlierKeys:
        """Raises ValueError for a pattern that is not cache friendly.

        >>> keys = EarlierKeys.of(AttentionPattern.sink_window(sink=2, window=3), start=8, stop=10, kv_heads=1)
        >>> keys.window_start, keys.far.int().tolist()
        (6, [[1, 1, 0, 0, 0, 0]])
        """
        if not pattern.is_cache_friendly:
            raise ValueError(f"context parallelism needs a causal pattern, got {pattern}")
        earlier, head = torch.arange(start, device=device), torch.arange(kv_heads, device=device)[:, None]
        first, last = (
            pattern.is_visible(torch.tensor(query, device=device), earlier, head).expand(kv_heads, start)
            for query in (start, stop - 1)
        )
        leaving = (first & ~last).any(0).nonzero()
        window_start = int(leaving[0]) if len(leaving) else start
        return cls(window_start, first[:, :window_start])


@dataclass(frozen=True, eq=False)
class Needs:
    """The rows of keys that a rank needs from others: (row, column, KV head) of the whole batch.

    First those of each row's window, by column and head; then each row's far keys, by head and column.

    Attributes:
        owner, row, column, head: int64 (rows,); `column` counts from the owner's first.
        pieces: the rank's documents, and for each of them `window_start`, where its keys begin.
        far: for each row of the batch how many far keys each KV head has.
    """

    owner: Tensor
    row: Tensor
    column: Tensor
    head: Tensor
    pieces: list[Piece]
    window_starts: list[int]
    far: list[list[int]]

    @property
    def window_rows(self) -> int:
        """How many of the rows belong to windows."""
        return len(self.owner) - sum(map(sum, self.far))

    def rows_from(self, ranks: int) -> list[int]:
        """How many of the rows each of `ranks` ranks owns."""
        counts: list[int] = torch.bincount(self.owner, minlength=ranks).tolist()
        return counts


@lru_cache(maxsize=64)
def needs_of(
    sharding: Sharding, pattern: AttentionPattern, kv_heads: int, rank: int, device: torch.device | None = None
) -> Needs:
    """What a rank needs: the same on every rank that asks."""
    pieces = sharding.pieces(rank)
    bounds, heads = torch.tensor(sharding.bounds, device=device), torch.arange(kv_heads, device=device)
    windows, far, window_starts = [], [], []
    far_counts = [[0] * kv_heads for _ in range(sharding.batch)]
    for piece in pieces:
        if piece.position == 0:
            window_starts.append(0)
            continue
        keys = EarlierKeys.of(pattern, piece.position, piece.position + piece.length, kv_heads, device)
        window_starts.append(keys.window_start)
        begin = piece.document_column
        window = torch.arange(begin + keys.window_start, piece.column, device=device)
        windows.append(torch.cartesian_prod(window.new_tensor([piece.row]), window, heads))
        head, column = keys.far.nonzero().unbind(1)
        far.append(torch.stack([torch.full_like(head, piece.row), begin + column, head], dim=1))
        far_counts[piece.row] = keys.far.sum(1).tolist()
    entries = torch.cat([torch.empty(0, 3, dtype=torch.int64, device=device), *windows, *far])
    row, column, head = entries.T.contiguous()
    owner = torch.bucketize(column, bounds, right=True) - 1
    return Needs(owner, row, column - bounds[owner], head, pieces, window_starts, far_counts)
