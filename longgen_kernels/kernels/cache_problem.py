"""The checked arguments of one call on a KV cache, which every backend takes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longgen_kernels.cache_layout import MAX_QUERY_TOKENS, CacheLayout
from longgen_kernels.kernels.problem import DTYPES, AttentionProblem

HALF_COUNTS = 3  # of more thread blocks than run at once
SEAT_COUNTS = 256  # for blocks of one size: one more than the multiprocessors of a GPU, at most


class CacheTensors(NamedTuple):
    """The memory of a cache, whoever owns it.

    k and v (batch, kv_heads, slots, head_dim), any strides with a unit last one; or, with `block_table` int32 (batch,
    pages a sequence), pages (pages, kv_heads, page_size, head_dim): slot `s` of sequence `b` is then row
    `s % page_size` of page `block_table[b, s // page_size]`. `seqlens` int32 (batch,): tokens that each sequence holds.

    An fp8 cache (float8_e4m3fn) has `k_scale` and `v_scale`, fp32 (kv_heads,), which its bytes are multiplied by, and
    `given_dtype`, that of the queries and new tokens.

    `equal_lengths`: all sequences are known to have one length. Results are the same without it.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    layout: CacheLayout
    block_table: Tensor | None = None
    tickets: Tensor | None = None  # see `tickets_needed`
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    given_dtype: torch.dtype | None = None
    equal_lengths: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, new tokens and output."""
        return self.k.dtype if self.given_dtype is None else self.given_dtype

    @property
    def is_fp8(self) -> bool:
        return self.k_scale is not None

    @property
    def batch(self) -> int:
        return self.seqlens.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[-1]

    @property
    def page_size(self) -> int:
        """Slots of a page; without pages, of the whole sequence."""
        return self.k.shape[2]

    @property
    def slots(self) -> int:
        """Slots that one sequence can have."""
        return self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])


class NewTokens(NamedTuple):
    """Keys and values (batch, n, kv_heads, head_dim) that follow a sequence's last token.

    `counts` int32 (batch,) says how many of the n rows a sequence has, all of them if None. `advance` adds them to the
    cache's `seqlens`.
    """

    k: Tensor
    v: Tensor
    counts: Tensor | None = None
    advance: bool = True

    @property
    def n(self) -> int:
        return self.k.shape[1]


class CacheProblem(NamedTuple):
    """Attention of a few queries to a cache, which `new` tokens are appended to first.

    q (batch, n, q_heads, head_dim). Row `i` stands at position `seqlens + q_offset + i`, with `seqlens` as it is before
    the call. Keys are all that the cache holds, the new tokens included.
    """

    q: Tensor
    cache: CacheTensors
    softmax_scale: float
    q_offset: int = 0
    new: NewTokens | None = None

    @property
    def n(self) -> int:
        """Query tokens."""
        return self.q.shape[1]

    @property
    def q_heads(self) -> int:
        return self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[2] // self.cache.kv_heads

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        """(batch, q_heads, n)."""
        return (self.q.shape[0], self.q.shape[2], self.q.shape[1])


def tickets_needed(batch: int, kv_heads: int) -> int:
    """Int32 zeros that kernels count with, of thread blocks.

    One for each sequence, and one for each KV head and 8 rows of the query: 16 tokens of 16 heads have 256. Those who
    have finished count these, which are zeros again after each kernel, as are `HALF_COUNTS`, of what the halves of the
    GPU have done. The last `SEAT_COUNTS` count which big blocks have begun, in all and on each multiprocessor, those
    before them small ones, and go on from one kernel to the next.
    """
    return batch * (1 + 2 * MAX_QUERY_TOKENS * kv_heads) + HALF_COUNTS + 2 * SEAT_COUNTS


@lru_cache(maxsize=4096)
def num_splits(blocks: int, tiles: int, slots: int, most: int = 128) -> int:
    """Into how many parts a sequence's tiles are split, so that `blocks` times as many thread blocks fill a GPU.

    Args:
        blocks: thread blocks of one part: sequences times KV heads times groups of rows.
        tiles: the most tiles that a sequence can have. Not its length: that may change when a CUDA graph is replayed.
        slots: thread blocks that the GPU holds at once.
        most: upper bound of the result.

    The fewest parts that come within 5% of the best use of the slots: each part costs a read and write of its result.

    >>> num_splits(32, 144, 264), num_splits(8, 144, 264), num_splits(256, 144, 264)
    (8, 32, 1)
    """
    most = max(1, min(most, tiles))
    blocks = max(1, blocks)

    def use(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / math.ceil(waves)

    candidates = range(1, most + 1)
    best = max(use(s) for s in candidates)
    return next(s for s in candidates if use(s) >= 0.95 * best)


def max_tiles(cache: CacheTensors, tile: int) -> int:
    """Tiles of `tile` slots that a sequence can have; its ring may begin and end inside one."""
    return -(-cache.slots // tile) + (1 if cache.layout.ring else 0)


def keys_end(cache: CacheTensors, new: NewTokens | None) -> Tensor:
    """Positions below which a sequence has keys, int64 (batch,): those of the cache and the new ones."""
    end = cache.seqlens.long()
    if new is not None:
        end = end + (new.n if new.counts is None else new.counts.long().clamp(0, new.n))
    return end


def as_attention(problem: CacheProblem) -> AttentionProblem:
    """The same problem as attention of a packed batch to keys in pages; for a layout that keeps everything.

    Its lengths are copies of those that the cache has now, on the device: it is made before the new tokens are
    appended, and runs afterwards. Without a block table all slots of a sequence, however many, are its one page.
    """
    q, cache = problem.q, problem.cache
    batch, n = q.shape[:2]
    table = cache.block_table
    if table is None:
        table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    ends = keys_end(cache, problem.new).clamp(max=cache.slots)  # tokens past the memory are dropped
    return AttentionProblem(
        q.flatten(0, 1), cache.k.transpose(1, 2), cache.v.transpose(1, 2), cache.layout.pattern, problem.softmax_scale,
        cu_seqlens_q=torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=q.device),
        cu_seqlens_k=torch.nn.functional.pad(ends.cumsum(0), (1, 0)).int(),
        q_starts=cache.seqlens + problem.q_offset,
        block_table=table,
    )  # fmt: skip


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 elsewhere, so that tests on the CPU split their sequences too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def check_cache(cache: CacheTensors) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the tensors of a cache fit together."""
    k, v, seqlens, table = cache.k, cache.v, cache.seqlens, cache.block_table
    _check_tensor("k_cache", k, k.device, 4, "(batch or pages, slots, kv_heads, head_dim)")
    _check_tensor("v_cache", v, k.device, 4, "(batch or pages, slots, kv_heads, head_dim)")
    if k.dtype not in DTYPES or v.dtype != k.dtype:
        raise TypeError(f"k_cache and v_cache must have one floating-point dtype, got {k.dtype} and {v.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k_cache and v_cache must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    for name, x in (("k_cache", k), ("v_cache", v)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in head_dim, got strides {x.stride()}")
    _check_ints("cache_seqlens", seqlens, k.device, (None,))
    if table is not None:
        _check_ints("block_table", table, k.device, (cache.batch, None))
    elif k.shape[0] != cache.batch:
        raise ValueError(f"cache_seqlens must have one entry a sequence, {k.shape[0]}, got {cache.batch}")


def check_new_tokens(cache: CacheTensors, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
    """Raise TypeError or ValueError, naming the argument, unless k and v can be appended to the cache."""
    for name, x in (("k", k), ("v", v)):
        _check_tensor(name, x, cache.k.device, 4, "(batch, n, kv_heads, head_dim)")
        if x.dtype != cache.dtype:
            raise TypeError(f"{name} must have the cache's dtype {cache.dtype}, got {x.dtype}")
        wanted = (cache.batch, k.shape[1], cache.kv_heads, cache.head_dim)
        if x.shape != wanted:
            raise ValueError(f"{name} must be (batch, n, kv_heads, head_dim) = {wanted}, got shape {tuple(x.shape)}")
    if counts is not None:
        _check_ints("counts", counts, cache.k.device, (cache.batch,))


def check_queries(cache: CacheTensors, q: Tensor) -> None:
    """Raise TypeError or ValueError unless q can attend to the cache."""
    _check_tensor("q", q, cache.k.device, 4, "(batch, n, q_heads, head_dim)")
    if q.dtype != cache.dtype:
        raise TypeError(f"q must have the cache's dtype {cache.dtype}, got {q.dtype}")
    batch, _, q_heads, head_dim = q.shape
    if batch != cache.batch or head_dim != cache.head_dim:
        raise ValueError(
            f"q must be (batch, n, q_heads, head_dim) with batch {cache.batch} and head_dim {cache.head_dim}, "
            f"got shape {tuple(q.shape)}"
        )
    if q_heads < 1 or q_heads % cache.kv_heads != 0:
        raise ValueError(f"q heads ({q_heads}) must be a multiple of the cache's kv heads ({cache.kv_heads})")
    if head_dim > 1 and q.stride(-1) != 1:
        raise ValueError(f"q must have stride 1 in head_dim, got strides {q.stride()}; call .contiguous()")


def _check_tensor(name: str, x: object, device: torch.device, ndim: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the cache's device {device}, got {x.device}")


def _check_ints(name: str, x: object, device: torch.device, shape: tuple[int | None, ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {x.dtype if isinstance(x, Tensor) else x!r}")
    if x.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be of shape ({wanted}), got {tuple(x.shape)}")
    if x.device != device or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous on {device}, got strides {x.stride()} on {x.device}")
