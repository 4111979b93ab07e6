"""Launches the kernels of csrc/decode. More query tokens than they take go to the forward kernel of csrc/sm90/fwd."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longgen_kernels.cache_layout import GRANULE, MAX_QUERY_TOKENS
from longgen_kernels.kernels.cache_problem import (
    HALF_COUNTS,
    SEAT_COUNTS,
    CacheProblem,
    CacheTensors,
    NewTokens,
    as_attention,
    multiprocessors,
    tickets_needed,
)
from longgen_kernels.kernels.cuda.arguments import DTYPE_NAMES, address, current_stream, has_aligned_rows, on_device
from longgen_kernels.kernels.cuda.attention import attention_unsupported, attn_fwd
from longgen_kernels.kernels.cuda.division import Division, division_of
from longgen_kernels.kernels.cuda.extension import available
from longgen_kernels.kernels.cuda.seating import NO_SEATS, Words, idle_seats, seating_on
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import MAX_POSITION

_HEAD_DIMS = (64, 96, 128, 256)
_FP8_HEAD_DIMS = (64, 128)
_MAX_GROUP = 16  # query heads of a KV head
_QUERY_TILE = 128  # rows, of the forward kernel


def cache_unsupported(cache: CacheTensors) -> str | None:
    """None if the kernels can append to the cache, otherwise the reason."""
    reason = available(cache.k.device)
    if reason is not None:
        return reason
    if cache.dtype not in DTYPE_NAMES:
        return f"takes float16 and bfloat16, got {cache.dtype}"
    if cache.head_dim not in _HEAD_DIMS:
        return f"takes head_dim 64, 96, 128 and 256, got {cache.head_dim}"
    if cache.is_fp8 and cache.head_dim not in _FP8_HEAD_DIMS:
        return f"takes head_dim 64 and 128 for fp8 caches, got {cache.head_dim}"
    if cache.k.stride() != cache.v.stride():
        return f"takes k and v of one layout in memory, got strides {cache.k.stride()} and {cache.v.stride()}"
    if not has_aligned_rows(cache.k) or not has_aligned_rows(cache.v):
        return f"takes caches with rows at multiples of 16 bytes, got strides {cache.k.stride()}"
    page = cache.page_size
    if cache.block_table is not None and (page < GRANULE or page & (page - 1)):
        return f"takes pages of a power of two of at least {GRANULE} tokens, got {page}"
    if cache.kv_heads > 65535 // (2 * MAX_QUERY_TOKENS) or cache.batch > 65535:
        return f"takes up to 2047 KV heads and 65535 sequences, got {cache.kv_heads} and {cache.batch}"
    return None


def cache_attention_unsupported(problem: CacheProblem) -> str | None:
    """None if the kernels can attend to the problem's cache, otherwise the reason."""
    if problem.new is not None and problem.new.n != problem.n:
        return f"takes as many new tokens as queries, got {problem.new.n} and {problem.n}"
    if problem.n > MAX_QUERY_TOKENS:
        return _chunk_unsupported(problem)
    if problem.group > _MAX_GROUP:
        return f"takes up to {_MAX_GROUP} query heads a KV head, got {problem.group}"
    reason = cache_unsupported(problem.cache)
    if reason is None and problem.cache.is_fp8 and not _runs_hopper_code(problem.q.device):
        return "attends to fp8 caches on Hopper (90a) only"
    return reason


def _chunk_unsupported(problem: CacheProblem) -> str | None:
    """Why the forward kernel cannot read the cache's keys with a chunk of queries, or None."""
    cache, most = problem.cache, f"takes up to {MAX_QUERY_TOKENS} query tokens"
    if not cache.layout.keeps_everything:
        return f"{most} of a cache that drops tokens, got {problem.n}"
    if cache.is_fp8:
        return f"{most} of an fp8 cache, got {problem.n}"
    # The keys of all sequences are counted in 32 bits.
    if cache.page_size < GRANULE or cache.batch * cache.slots > MAX_POSITION:
        return f"{most} of {cache.batch} sequences of {cache.slots} slots, got {problem.n}"
    reason = cache_unsupported(cache)
    if reason is not None:
        return reason
    # Not `as_attention`, which computes on the device: to be asked about, queries and keys need not be packed.
    k, v, table = cache.k.transpose(1, 2), cache.v.transpose(1, 2), cache.block_table
    pattern, scale = cache.layout.pattern, problem.softmax_scale
    return attention_unsupported(AttentionProblem(problem.q, k, v, pattern, scale, block_table=table))


def leaves_gpu_idle(problem: CacheProblem) -> bool:
    """Whether a chunk has too few query tiles for the forward kernel, which does not split a sequence's keys.

    Triton's cache kernel does, and with all multiprocessors achieves about what this one does with half of them.
    """
    if problem.n <= MAX_QUERY_TOKENS:
        return False
    full_tiles = problem.n // _QUERY_TILE * problem.q_heads * problem.cache.batch
    return 2 * full_tiles < multiprocessors(problem.q.device)


def cache_append(cache: CacheTensors, new: NewTokens) -> None:
    """Writes the new tokens to their slots and adds them to the lengths, in one launch."""
    from longgen_kernels import _C

    k, v = _aligned(new.k, new.v)
    tickets = _tickets(cache)
    arguments = (*_cache(cache), *_new_tokens(new, k, v), tickets.data_ptr(), current_stream(k))
    with on_device(cache.k):
        _C.cache_append(*arguments)


def cache_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Output (like q, contiguous) and LSE (fp32, `problem.lse_shape`), the new tokens appended first.

    One launch, but for chunks of more tokens than the decode kernels take.
    """
    if problem.n > MAX_QUERY_TOKENS:
        return _chunk_attn(problem)
    from longgen_kernels import _C

    q, cache, new = problem.q, problem.cache, problem.new
    batch, n, q_heads, head_dim = q.shape
    (q,) = _aligned(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, q_heads, n, dtype=torch.float32)
    group_rows = n * problem.group
    rows = _C.decode_rows_per_tile(rows=group_rows, head_dim=head_dim)
    row_tiles = -(-group_rows // rows)
    blocks = batch * cache.kv_heads * row_tiles
    hopper = _runs_hopper_code(q.device)
    bulk = hopper and _has_slots(cache) and not _is_scattered(cache)
    division = division_of(cache, blocks, rows, multiprocessors(q.device), bulk)
    part_out = part_weights = None
    parts = division.parts(blocks)
    if parts > 0:
        part_weights = torch.empty(parts * rows * 2, dtype=torch.float32, device=q.device)
        part_out = torch.empty(parts * rows * head_dim, dtype=torch.float32, device=q.device)
    k, v = (q, q) if new is None else _aligned(new.k, new.v)
    tickets = _tickets(cache)
    seats = _seats(division, blocks, tickets)
    starts_early = hopper and division.starts_early and cache.tickets is not None  # others are not yet zeros then
    # By position: as keywords they would cost the host more than an allocation.
    arguments = (
        *_cache(cache), *_new_tokens(new, k, v), tickets.data_ptr(), seats.counts,
        n, q_heads, problem.q_offset, problem.softmax_scale,
        q.data_ptr(), q.stride()[:3], out.data_ptr(), lse.data_ptr(),
        division.splits, division.whole_tiles, starts_early, bulk, division.clustered, division.small_blocks,
        division.persistent_blocks, seats.number, seats.bits, address(part_out), address(part_weights),
        current_stream(q),
    )  # fmt: skip
    with on_device(q):
        _C.attn_decode(*arguments)
    return out, lse


class _Seats(NamedTuple):
    number: int
    bits: Words
    counts: int  # the address


_NONE = _Seats(0, NO_SEATS, 0)


def _seats(division: Division, tiles: int, tickets: Tensor) -> _Seats:
    if division.seats == 0:
        return _NONE
    seating = seating_on(tickets.device, multiprocessors(tickets.device))
    if not division.halves.are(seating.halves_differ):
        return _NONE
    each, items = 2 if division.small_blocks else 1, division.items(tiles)
    if items > each * division.seats:
        bits, before = seating.first_half, 2 * SEAT_COUNTS + HALF_COUNTS
    else:
        bits, before = idle_seats(seating.idle_order, division.seats, items), each * SEAT_COUNTS
    return _Seats(division.seats, bits, tickets.data_ptr() + (tickets.numel() - before) * tickets.element_size())


def _chunk_attn(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Appends, and attends to all keys in one pass of the forward kernel."""
    attention = as_attention(problem)  # with the lengths as they are now
    if problem.new is not None:
        cache_append(problem.cache, problem.new)
    out, lse = attn_fwd(attention)
    packed = problem.q.shape[:2]
    return out.unflatten(0, packed), lse.unflatten(1, packed).transpose(0, 1).contiguous()


def _has_slots(cache: CacheTensors) -> bool:
    """Whether a sequence has room for tokens: with a pattern that shows none it has not, though the pool has pages."""
    return cache.k.numel() > 0 and (cache.block_table is None or cache.block_table.numel() > 0)


def _is_scattered(cache: CacheTensors) -> bool:
    """Whether strided blocks of less than a granule lie where their positions say, each in a place of its own."""
    pattern = cache.layout.pattern
    small = pattern.block_size is not None and pattern.block_size < GRANULE
    return cache.layout.ring is None and pattern.stride is not None and small


@lru_cache
def _runs_hopper_code(device: torch.device) -> bool:
    """Dependent launches and bulk copies need code for Hopper itself: later GPUs run the kernels' PTX, for sm_80."""
    from longgen_kernels import _C

    return torch.cuda.get_device_capability(device) == (9, 0) and "90a" in _C.build_info()["cuda_archs"].split(",")


def _cache(cache: CacheTensors) -> tuple[Any, ...]:
    """From `pattern` to `v_scale`."""
    layout, k, table = cache.layout, cache.k, cache.block_table
    pages, log2_page, pool_pages = 0, 0, 0
    if table is not None:
        pages, log2_page, pool_pages = table.shape[1], cache.page_size.bit_length() - 1, k.shape[0]
    return (
        layout.pattern.encode(), -1 if layout.ring is None else layout.ring, layout.sink_slots,
        cache.batch, cache.kv_heads, cache.head_dim, cache.slots, pages, log2_page, pool_pages,
        DTYPE_NAMES[cache.dtype], k.data_ptr(), cache.v.data_ptr(), k.stride()[:3],
        cache.seqlens.data_ptr(), address(table), address(cache.k_scale), address(cache.v_scale),
    )  # fmt: skip


def _new_tokens(new: NewTokens | None, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """From `k` to `advance`."""
    n, counts, advance = (0, None, False) if new is None else (new.n, new.counts, new.advance)
    return k.data_ptr(), v.data_ptr(), k.stride()[:3], n, address(counts), advance


def _tickets(cache: CacheTensors) -> Tensor:
    """The cache's own, or zeros, which cost a launch."""
    if cache.tickets is not None:
        return cache.tickets
    return torch.zeros(tickets_needed(cache.batch, cache.kv_heads), dtype=torch.int32, device=cache.k.device)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or copies of them, with aligned rows and one layout in memory."""
    if all(has_aligned_rows(x) and _lie_alike(x, tensors[0]) for x in tensors):
        return tensors
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    """Whether elements of one index lie equally far from the start. One token's keys and values, of which a model has
    turned only the keys, do so although the strides of the one token differ."""
    return x.stride() == y.stride() or all(
        s == t or n == 1 for s, t, n in zip(x.stride(), y.stride(), x.shape, strict=True)
    )
