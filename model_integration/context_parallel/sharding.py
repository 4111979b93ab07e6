"""Which tokens of a batch each rank holds, and which documents they belong to."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from model_integration.layout import SequenceLayout


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document on one rank.

    Attributes:
        row, column: where it begins in the whole batch.
        length: its tokens.
        position: where its first token stands in the document; above 0 the document began on an earlier rank.
    """

    row: int
    column: int
    length: int
    position: int

    @property
    def document_column(self) -> int:
        """The column at which the document begins."""
        return self.column - self.position


@dataclass(frozen=True)
class Sharding:
    """A batch of `batch` rows of `length` tokens, of which rank `r` holds the columns `bounds[r]:bounds[r + 1]`.

    It is plain numbers, the same on every rank, so that each rank can tell what the others need.

    Attributes:
        documents: boundaries of the sequences in the flattened (batch * length) tokens, the rows' ends among them.

    >>> Sharding.of(1, 10, 4).bounds
    (0, 2, 5, 7, 10)
    """

    batch: int
    length: int
    ranks: int
    documents: tuple[int, ...]

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        ranks: int,
        *,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> Sharding:
        """The sharding of a whole batch; packed documents as the model takes them.

        Args:
            position_ids: (batch or 1, length) of the whole batch; a document begins where they do not rise by one.
            cu_seq_lens: (documents + 1,) boundaries in the flattened tokens, instead.

        Raises ValueError when there are fewer columns than ranks or a document crosses from row to row.
        """
        if length < ranks:
            raise ValueError(f"length must be at least one token for each of {ranks} ranks, got {length}")
        layout = SequenceLayout.of(batch, length, position_ids=position_ids, cu_seq_lens=cu_seq_lens)
        rows = range(0, batch * length + 1, length)
        documents = tuple(rows) if layout.cu_seq_lens is None else tuple(layout.cu_seq_lens.tolist())
        if not set(rows) <= set(documents):
            raise ValueError(f"cu_seq_lens must have a boundary at every row's end, every {length} tokens")
        return cls(batch, length, ranks, documents)

    @property
    def bounds(self) -> tuple[int, ...]:
        """(ranks + 1,) first columns."""
        return tuple(self.length * rank // self.ranks for rank in range(self.ranks + 1))

    @property
    def is_plain(self) -> bool:
        """True when each row is one document."""
        return len(self.documents) == self.batch + 1

    def tokens(self, rank: int) -> int:
        """Tokens of each row that a rank holds."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def pieces(self, rank: int) -> list[Piece]:
        """The documents' parts on a rank, row by row; only the first of a row can have begun earlier."""
        pieces = []
        for row in range(self.batch):
            at, end = (row * self.length + bound for bound in self.bounds[rank : rank + 2])
            document = bisect_right(self.documents, at) - 1
            while at < end:
                stop = min(end, self.documents[document + 1])
                if stop > at:  # documents may be empty
                    pieces.append(Piece(row, at - row * self.length, stop - at, at - self.documents[document]))
                at, document = stop, document + 1
        return pieces

    def position_ids(self, rank: int, device: torch.device | None = None) -> Tensor:
        """(batch, tokens) int64: where each of a rank's tokens stands in its document."""
        runs = [torch.arange(p.position, p.position + p.length, device=device) for p in self.pieces(rank)]
        return torch.cat(runs).view(self.batch, self.tokens(rank))
