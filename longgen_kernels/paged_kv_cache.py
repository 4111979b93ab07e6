"""`PagedKVCache`: the same cache in pages of a pool that many sequences, and their ends, share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.cache_layout import GRANULE, MAX_QUERY_TOKENS, CacheLayout
from longgen_kernels.cache_scales import as_bytes, checked_scales
from longgen_kernels.kernels.cache_problem import CacheTensors, tickets_needed
from longgen_kernels.kv_cache import KVCache
from longgen_kernels.patterns import AttentionPattern, pattern_from_dict

__all__ = ["PagePool", "PagedKVCache"]


class PagePool:
    """Memory of one layer for `pages` pages of `page_size` tokens of every KV head, and which of them are free.

    Args:
        pages, kv_heads, head_dim: sizes.
        page_size: tokens, a multiple of 16; the kernels take powers of two.
        dtype, device: of k and v, queries and output.
        cache_dtype, k_scale, v_scale: as in `SparseKVCache`; the scales are one for all caches that share the pool.

    Attributes: `k` and `v` (pages, kv_heads, page_size, head_dim), `free` (the number of free pages),
        `dtype`, `k_scale` and `v_scale`.

    >>> PagePool(pages=8, page_size=16, kv_heads=2, head_dim=64, dtype=torch.float32).free
    8
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        cache_dtype: torch.dtype | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"pages": pages, "page_size": page_size, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__} {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if page_size % GRANULE:
            raise ValueError(f"page_size must be a multiple of {GRANULE}, got {page_size}")
        self.k_scale: Tensor | None
        self.v_scale: Tensor | None
        self.k_scale, self.v_scale = checked_scales(dtype, cache_dtype, kv_heads, k_scale, v_scale, device)
        self.dtype = dtype
        shape = (pages, kv_heads, page_size, head_dim)
        self.k, self.v = (torch.empty(shape, dtype=cache_dtype or dtype, device=device) for _ in range(2))
        self._free = list(range(pages))[::-1]

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, n: int) -> list[int]:
        """Numbers of n pages that nobody else has; MemoryError if there are not so many."""
        if n > self.free:
            raise MemoryError(f"{n} pages are needed, {self.free} of the pool's {self.k.shape[0]} are free")
        return [self._free.pop() for _ in range(n)]

    def give_back(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


class PagedKVCache(KVCache):
    """Keys and values of a batch of sequences in pages, which go back to their pool once no query sees them any more.

    As `SparseKVCache`, with memory by page: a sequence has those that its tokens fill. One table serves all KV heads:
    slots follow from the order of the permanent tokens, which is as long, but for one block, in every head.

    The host plans the pages, so it needs the lengths; after an append with `counts`, which only the device knows, it
    goes on with bounds, and `lengths_are` tells it more. Pages change only in `reserve`, which every append calls, and
    in `crop`, `reset` and `reorder`: before replays of a CUDA graph, call `reserve` for their tokens.

    Args:
        pattern: what later queries see; not a block mask, which may show any key again.
        pool: where the pages come from; caches of one shape may share it.
        batch: sequences.
        max_seqlen: tokens of the longest sequence, seen, not kept.

    Attributes: `block_table` int32 (batch, pages a sequence), -1 where there is none; `seqlens` int32 (batch,).

    Raises:
        TypeError, ValueError: an argument does not fit.
        NotImplementedError: the pattern is a block mask or bidirectional.
        MemoryError: the pool has too few free pages; nothing has changed then.

    Source: paged attention in vLLM (arXiv 2309.06180).

    >>> pool = PagePool(pages=8, page_size=16, kv_heads=2, head_dim=64, dtype=torch.float32)
    >>> cache = PagedKVCache(AttentionPattern.sink_window(sink=4, window=32), pool, batch=1, max_seqlen=4096)
    >>> for _ in range(10):
    ...     cache.append(torch.randn(1, 100, 2, 64), torch.randn(1, 100, 2, 64))
    >>> cache.seqlens.tolist(), pool.free
    ([1000], 4)
    """

    def __init__(self, pattern: AttentionPattern, pool: PagePool, batch: int, max_seqlen: int) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 1:
            raise ValueError(f"max_seqlen must be an int of at least 1, got {max_seqlen!r}")
        self.pool = pool
        self.layout = CacheLayout.compact(pattern, max_seqlen, pool.page_size)
        self.max_seqlen = max_seqlen
        self.k, self.v, self.dtype = pool.k, pool.v, pool.dtype
        self.k_scale, self.v_scale = pool.k_scale, pool.v_scale
        device, kv_heads = pool.k.device, pool.k.shape[1]
        # Not last: who counts with them may start early, beside the kernel that fills what comes behind.
        self.tickets = torch.zeros(tickets_needed(batch, kv_heads), dtype=torch.int32, device=device)
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        entries = -(-self.layout.slots(max_seqlen, kv_heads) // pool.page_size)
        self.block_table = torch.full((batch, entries), -1, dtype=torch.int32, device=device)
        self._table = [[-1] * entries for _ in range(batch)]
        self._shortest, self._longest = [0] * batch, [0] * batch  # bounds of the lengths
        self._reserved = [0] * batch  # lengths that there are pages for
        self._cropped = 0  # no sequence has been longer by more tokens than it is
        self._heads = range(min(kv_heads, pattern.stride or 1))  # further heads repeat these heads' phases

    @property
    def tensors(self) -> CacheTensors:
        return CacheTensors(
            self.k, self.v, self.seqlens, self.layout, self.block_table, self.tickets, self.k_scale, self.v_scale,
            self.dtype, self.equal_lengths,
        )  # fmt: skip

    @property
    def is_empty(self) -> bool:
        return max(self._longest) == 0

    @property
    def equal_lengths(self) -> bool:
        return self.batch == 1 or min(self._shortest) == max(self._longest)

    @property
    def pages(self) -> int:
        """Pages that the sequences have."""
        return sum(page >= 0 for row in self._table for page in row)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in those pages."""
        return self.pages * 2 * self.k[0].nbytes

    def reserve(self, tokens: int) -> None:
        longest = max(self._longest) + tokens
        if longest > self.max_seqlen:
            raise ValueError(
                f"{tokens} more tokens than {longest - tokens} would pass max_seqlen={self.max_seqlen}; "
                "make the cache larger"
            )
        ends = [max(old, n + tokens) for old, n in zip(self._reserved, self._longest, strict=True)]
        passed = [list(self._passed(b)) for b in range(self.batch)]
        needed = [[e for e in self._entries(b, end) if self._table[b][e] < 0 or e in passed[b]]
                  for b, end in enumerate(ends)]  # fmt: skip
        returned = [self._table[b][e] for b in range(self.batch) for e in passed[b]]
        wanted = sum(map(len, needed))
        if wanted > self.pool.free + len(returned):
            self.pool.take(wanted - len(returned))  # raises, and says what is missing
        self.pool.give_back(returned)
        pages = iter(self.pool.take(wanted))
        for row, old, new in zip(self._table, passed, needed, strict=True):
            for entry in old:
                row[entry] = -1
            for entry in new:
                row[entry] = next(pages)
        self._reserved = ends
        if returned or wanted:
            self._upload()

    def advanced(self, tokens: int, fewest: int | None = None) -> None:
        fewest = tokens if fewest is None else fewest
        self._shortest = [n + fewest for n in self._shortest]
        self._longest = [n + tokens for n in self._longest]
        self._cropped = max(0, self._cropped - fewest)

    def lengths_are(self, lengths: Sequence[int]) -> None:
        """Tells the host the exact lengths, where it has only bounds."""
        bounds = zip(lengths, self._shortest, self._longest, strict=True)
        if any(not low <= n <= high for n, low, high in bounds):
            raise ValueError(f"lengths must be from {self._shortest} to {self._longest}, got {list(lengths)}")
        self._shortest, self._longest = list(lengths), list(lengths)

    def check_still_kept(self, tokens: int) -> None:
        passed = self.layout.ring and max(self._longest) + self._cropped > self.layout.window_tokens
        if passed and self._cropped + tokens > MAX_QUERY_TOKENS:
            raise ValueError(
                f"a query {tokens} tokens before the end, {self._cropped} tokens having been cropped, may need keys "
                f"whose pages were returned; {MAX_QUERY_TOKENS} tokens are kept beyond the window"
            )

    def crop(self, tokens: int | Sequence[int]) -> None:
        """Drops the last tokens of each sequence, as after rejected drafts; sequences of fewer become empty.

        Args:
            tokens: how many; or one number for each sequence.

        Raises ValueError where keys that the window of the last token left would show may be gone: up to 16 tokens
        beyond the window are kept, less those cropped since.
        """
        dropped = list(tokens) if isinstance(tokens, Sequence) else [tokens] * self.batch
        if any(isinstance(n, bool) or not isinstance(n, int) for n in dropped):
            raise TypeError(f"tokens must be an int or ints, got {tokens!r}")
        if len(dropped) != self.batch or not 0 <= min(dropped) <= max(dropped) <= max(self._longest):
            raise ValueError(
                f"tokens must be in [0, {max(self._longest)}], one number or {self.batch} of them; got {tokens}"
            )
        self.check_still_kept(max(dropped))
        self._cropped += max(dropped)
        self.seqlens.sub_(self.seqlens.new_tensor(dropped)).clamp_(min=0)
        self._shortest, self._longest = (
            [max(0, n - drop) for n, drop in zip(bounds, dropped, strict=True)]
            for bounds in (self._shortest, self._longest)
        )
        self._reserved = list(self._longest)
        first = (self.layout.ring or 0) // self.pool.page_size
        for b, row in enumerate(self._table):
            self._drop(row, range(first + self._permanent_pages(self._longest[b]), len(row)))
        self._upload()

    def reset(self, sequence: int | None = None) -> None:
        """Empties one sequence, or all, and returns their pages; ValueError for a sequence that is not in the batch."""
        if sequence is not None and not 0 <= sequence < self.batch:
            raise ValueError(f"sequence must be in [0, {self.batch}), got {sequence}")
        for b in range(self.batch) if sequence is None else (sequence,):
            self._drop(self._table[b], range(len(self._table[b])))
            self._shortest[b] = self._longest[b] = self._reserved[b] = 0
            self.seqlens[b].zero_()
        if max(self._longest) == 0:
            self._cropped = 0
        self._upload()

    def reorder(self, indices: Sequence[int]) -> None:
        """Makes sequence `b` a copy of what sequence `indices[b]` was: beams.

        Pages are handed over; only those of a sequence that is wanted more than once are copied.
        """
        if len(indices) != self.batch or any(not 0 <= i < self.batch for i in indices):
            raise ValueError(f"indices must be {self.batch} numbers below {self.batch}, got {list(indices)}")
        again = [b for b, i in enumerate(indices) if i in indices[:b]]
        unused = [i for i in range(self.batch) if i not in indices]
        self._check_room(sum(page >= 0 for b in again for page in self._table[indices[b]]), unused)
        for i in unused:
            self._drop(self._table[i], range(len(self._table[i])))
        rows = [list(self._table[i]) for i in indices]
        for b in again:
            entries = [e for e, page in enumerate(rows[b]) if page >= 0]
            old, new = [rows[b][e] for e in entries], self.pool.take(len(entries))
            for x in (self.k, self.v):
                as_bytes(x)[new] = as_bytes(x)[old]
            for entry, page in zip(entries, new, strict=True):
                rows[b][entry] = page
        self._table = rows
        bounds = (self._shortest, self._longest, self._reserved)
        self._shortest, self._longest, self._reserved = ([x[i] for i in indices] for x in bounds)
        self.seqlens.copy_(self.seqlens[list(indices)])
        self._upload()

    def state_dict(self) -> dict[str, Any]:
        """Of the pool, the pages that are this cache's."""
        own = [page for row in self._table for page in row if page >= 0]
        return {
            "pattern": self.pattern.to_dict(),
            "max_seqlen": self.max_seqlen,
            "filled": [[page >= 0 for page in row] for row in self._table],
            "bounds": [list(x) for x in (self._shortest, self._longest, self._reserved)],
            "cropped": self._cropped,
            "k": as_bytes(self.k)[own].view(self.k.dtype),
            "v": as_bytes(self.v)[own].view(self.v.dtype),
            "scales": [scale for scale in (self.k_scale, self.v_scale) if scale is not None],
            "seqlens": self.seqlens.clone(),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], pool: PagePool) -> PagedKVCache:
        """The cache that `save` wrote, in pages of `pool`; see `from_state_dict`."""
        return cls.from_state_dict(torch.load(path, map_location=pool.k.device, weights_only=True), pool)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], pool: PagePool) -> PagedKVCache:
        """The cache that `state_dict` described, in pages of `pool`.

        Raises ValueError for a pool whose pages are of another shape, dtype or scale, MemoryError for one with too few.
        """
        pattern, k = pattern_from_dict(state["pattern"]), state["k"]
        assert isinstance(pattern, AttentionPattern)
        if (k.shape[1:], k.dtype) != (pool.k.shape[1:], pool.k.dtype):
            raise ValueError(
                f"the pool's pages are {tuple(pool.k.shape[1:])} (kv_heads, page_size, head_dim) of {pool.k.dtype}, "
                f"the saved ones {tuple(k.shape[1:])} of {k.dtype}"
            )
        scales = [scale for scale in (pool.k_scale, pool.v_scale) if scale is not None]
        for own, saved in zip(scales, state["scales"], strict=True):  # none without fp8, which the dtypes have shown
            if not torch.equal(own, saved.to(own.device)):
                raise ValueError(f"the pool's scales are {own.tolist()}, the saved ones {saved.tolist()}")
        cache = cls(pattern, pool, len(state["filled"]), state["max_seqlen"])
        pages = pool.take(len(k))
        for own, saved in ((pool.k, k), (pool.v, state["v"])):
            as_bytes(own)[pages] = as_bytes(saved).to(own.device)
        numbers = iter(pages)
        cache._table = [[next(numbers) if filled else -1 for filled in row] for row in state["filled"]]
        cache._shortest, cache._longest, cache._reserved = (list(x) for x in state["bounds"])
        cache._cropped = state["cropped"]
        cache.seqlens.copy_(state["seqlens"])
        cache._upload()
        return cache

    def _check_room(self, pages: int, unused: Sequence[int]) -> None:
        returned = sum(page >= 0 for i in unused for page in self._table[i])
        if pages > self.pool.free + returned:
            self.pool.take(pages - returned)  # raises, and says what is missing

    def _entries(self, b: int, end: int) -> list[int]:
        """Entries of the table that the tokens of sequence `b` from its last on, up to `end`, go to."""
        page, ring = self.pool.page_size, self.layout.ring or 0
        permanent = range(ring // page, ring // page + self._permanent_pages(end))
        first = max(self._shortest[b], end - ring, self.layout.sink_slots)
        if ring == 0 or first >= end:
            return list(permanent)
        recent = {j % ring // page for j in (*range(first, end, page), end - 1)}
        return [*recent, *permanent]

    def _permanent_pages(self, end: int) -> int:
        slots = max(self.layout.permanent_slots(end, head) for head in self._heads)
        return -(-slots // self.pool.page_size)

    def _passed(self, b: int) -> Iterator[int]:
        """Entries of the ring whose tokens no query sees, also not after a crop."""
        page, ring = self.pool.page_size, self.layout.ring or 0
        seen_from = self._shortest[b] + 1 - self.layout.window_tokens - MAX_QUERY_TOKENS
        last = self._reserved[b] - 1
        for entry in range(ring // page):
            # The page's newest token: the last one of all, or the one in the page's last slot.
            newest = last if last % ring // page == entry else last - (last - (entry * page + page - 1)) % ring
            if self._table[b][entry] >= 0 and newest < seen_from:
                yield entry

    def _drop(self, row: list[int], entries: range) -> None:
        self.pool.give_back([row[e] for e in entries if row[e] >= 0])
        for entry in entries:
            row[entry] = -1

    def _upload(self) -> None:
        self.block_table.copy_(torch.tensor(self._table, dtype=torch.int32), non_blocking=True)
