"""PagedKVCache: the same results as a cache that keeps everything, and pages that come back to the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import INTERPRETED
from cache_model import PATTERNS, A, Everything, assert_close, new_tokens, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import PHASES, backends, kinds, settings_of

from longgen_kernels import AttentionPattern, PagedKVCache, PagePool, SparseKVCache, longgen_attn_with_kvcache

MAX_SEQLEN = 400


def model_and_cache(
    pattern: AttentionPattern, backend: str, poison: Any, *, batch: int = 2, pages: int = 120, page_size: int = 16
) -> tuple[Everything, PagedKVCache]:
    sizes = settings_of(backend)
    pool = PagePool(pages, page_size, 2, sizes["head_dim"], dtype=sizes["dtype"], device=sizes["device"])
    return Everything(pattern, batch, 2, **sizes), PagedKVCache(pattern, poisoned(pool, poison), batch, MAX_SEQLEN)


def step(model: Everything, cache: PagedKVCache, n: int, backend: str, counts: list[int] | None = None) -> None:
    q, k, v = new_tokens(model, n, 4)
    starts = model.lengths
    model.append(k, v, counts)
    on_device = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=model.device)
    got = longgen_attn_with_kvcache(q, cache, k, v, counts=on_device, return_lse=True, backend=backend)
    if counts is not None:
        cache.lengths_are(model.lengths)
    assert_close(got, model.attend(q, starts), counts)


def assert_pages_add_up(cache: PagedKVCache) -> None:
    """Every page is in one place: free, or in one entry of the table, on the device as on the host."""
    used = cache.block_table[cache.block_table >= 0].tolist()
    assert sorted([*used, *cache.pool._free]) == list(range(cache.pool.k.shape[0]))
    assert cache.block_table.tolist() == cache._table
    assert cache.pages == len(used)


@backends
@kinds
def test_chunks_and_steps(kind: str, backend: str, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS[kind], backend, poison)
    for n in (1, 16, 1, 30, 2, 5) if INTERPRETED else (1, 16, 1, 30, 2, 90, 5, 1, 64, 16):
        step(model, cache, n, backend if n <= 16 or backend != "cuda" else "auto")
        assert_pages_add_up(cache)


OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 40)),
    st.tuples(st.just("ragged"), st.lists(st.integers(0, 20), min_size=3, max_size=3)),
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("reserve"), st.integers(0, 50)),
    st.tuples(st.just("crop"), st.integers(0, 12) | st.lists(st.integers(0, 12), min_size=3, max_size=3)),
    st.tuples(st.just("reload"), st.none()),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("reset"), st.sampled_from([None, 0, 2])),
)


@given(data=st.data(), kind=st.sampled_from(sorted(PATTERNS)), page_size=st.sampled_from([16, 32]))
@settings(phases=PHASES, print_blob=True)
def test_any_sequence_of_operations(kind: str, page_size: int, poison: Any, data: st.DataObject) -> None:
    model, cache = model_and_cache(PATTERNS[kind], "reference", poison, batch=3, page_size=page_size)
    for name, argument in data.draw(st.lists(OPERATIONS, min_size=3, max_size=20)):
        longest = max(model.lengths)
        if name == "step" and longest + argument <= MAX_SEQLEN:
            step(model, cache, argument, "reference")
        elif name == "ragged" and longest + max(argument) <= MAX_SEQLEN:
            step(model, cache, max(argument), "reference", argument)
        elif name == "append" and longest + argument <= MAX_SEQLEN:
            _, k, v = new_tokens(model, argument, 1)
            model.append(k, v)
            cache.append(k, v)
        elif name == "reserve" and longest + argument <= MAX_SEQLEN:
            cache.reserve(argument)
        elif name == "crop":
            each = [argument] * 3 if isinstance(argument, int) else argument
            if cache._cropped + max(each) <= 16 and max(each) <= longest:
                model.crop(each)
                cache.crop(argument)
        elif name == "reload":  # into a pool that others have used
            state, other = (
                cache.state_dict(),
                poisoned(PagePool(120, page_size, 2, model.head_dim, dtype=model.dtype), poison),
            )
            other.give_back(other.take(7)[::-1])
            cache = PagedKVCache.from_state_dict(state, other)
        elif name == "reorder":
            model.reorder(argument)
            cache.reorder(argument)
        elif name == "reset":
            for b in range(3) if argument is None else [argument]:
                model.crop([model.lengths[b] if i == b else 0 for i in range(3)])
            cache.reset(argument)
        assert cache.seqlens.tolist() == model.lengths
        assert not cache.equal_lengths or len(set(model.lengths)) == 1
        assert_pages_add_up(cache)
    if max(model.lengths) < MAX_SEQLEN:
        step(model, cache, 1, "reference")


def test_pages_are_returned_as_soon_as_the_window_has_passed_them(poison: Any) -> None:
    pattern = A.sink_window(4, 100)
    model, cache = model_and_cache(pattern, "reference", poison, batch=1)
    most = 0
    for _ in range(MAX_SEQLEN):
        step(model, cache, 1, "reference")
        most = max(most, cache.pages)
        tokens = pattern.kept_tokens(model.lengths[0])
        # Whole pages: one for the sink, and one more than the window and the 16 tokens of a crop fill.
        assert cache.pages <= 1 + 1 + -(-min(tokens + 16, 116) // 16)
    assert most == 9
    assert cache.nbytes == cache.pages * 2 * cache.pool.k[0].nbytes
    cache.reset()
    assert cache.pool.free == cache.pool.k.shape[0]


def test_a_pool_that_is_empty_says_so_and_nothing_changes(poison: Any) -> None:
    model, cache = model_and_cache(A.causal(), "reference", poison, pages=5)
    step(model, cache, 20, "reference")
    with pytest.raises(MemoryError, match="2 pages are needed, 1 of the pool's 5 are free"):
        cache.reserve(13)
    assert_pages_add_up(cache)
    step(model, cache, 12, "reference")
    cache.reset(1)
    model.crop([0, 32])
    cache.reserve(5)


def test_several_caches_share_a_pool(poison: Any) -> None:
    pool = PagePool(40, 16, 2, 16, dtype=torch.float32)
    poisoned(pool, poison)
    caches = [PagedKVCache(PATTERNS[kind], pool, 1, MAX_SEQLEN) for kind in ("causal", "sink and window")]
    models = [Everything(cache.pattern, 1, 2, 16) for cache in caches]
    for n in (30, 1, 40, 2, 70):
        for model, cache in zip(models, caches, strict=True):
            step(model, cache, n, "reference")
    used = [set(cache.block_table[cache.block_table >= 0].tolist()) for cache in caches]
    assert not used[0] & used[1]


def test_bounds_of_lengths_that_only_the_device_knows(poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS["sink and window"], "reference", poison)
    _, k, v = new_tokens(model, 50, 1)
    assert cache.equal_lengths
    cache.append(k, v, torch.tensor([50, 3], dtype=torch.int32))
    assert not cache.equal_lengths
    with pytest.raises(ValueError, match=r"lengths must be from \[0, 0\] to \[50, 50\], got \[50, 51\]"):
        cache.lengths_are([50, 51])
    cache.lengths_are([50, 3])
    assert not cache.equal_lengths
    with pytest.raises(ValueError, match="351 more tokens than 50 would pass max_seqlen=400"):
        cache.reserve(351)
    cache.reset()
    assert cache.tensors.equal_lengths


def test_holds_what_a_cache_in_one_block_holds(poison: Any) -> None:
    pattern = PATTERNS["strided blocks with per-head phases"]
    model, paged = model_and_cache(pattern, "reference", poison)
    flat = SparseKVCache(pattern, 2, 2, model.head_dim, MAX_SEQLEN, dtype=torch.float32)
    q, k, v = new_tokens(model, 200, 4)
    for cache in (paged, flat):
        cache.append(k, v)
    outs = [longgen_attn_with_kvcache(q[:, -1:], cache) for cache in (paged, flat)]
    torch.testing.assert_close(*outs)


def test_saved_and_loaded_into_another_pool(poison: Any, tmp_path: Path) -> None:
    model, cache = model_and_cache(PATTERNS["sink and window"], "reference", poison)
    step(model, cache, 130, "reference")
    cache.save(tmp_path / "cache.pt")
    pool = PagePool(cache.pages, 16, 2, model.head_dim, dtype=model.dtype)
    loaded = PagedKVCache.load(tmp_path / "cache.pt", pool)
    assert (loaded.pages, pool.free) == (cache.pages, 0)
    for wrong, error, message in (
        (PagePool(99, 32, 2, model.head_dim, dtype=model.dtype), ValueError, r"the pool's pages are \(2, 32, 16\)"),
        (PagePool(3, 16, 2, model.head_dim, dtype=model.dtype), MemoryError, "3 of the pool's 3 are free"),
    ):
        with pytest.raises(error, match=message):
            PagedKVCache.load(tmp_path / "cache.pt", wrong)
        assert wrong.free == wrong.k.shape[0]
    loaded.crop([3, 9])
    model.crop([3, 9])
    step(model, loaded, 2, "reference")


def test_bad_arguments() -> None:
    pool = PagePool(4, 16, 1, 16)

    def empty() -> PagedKVCache:
        return PagedKVCache(A.causal(), pool, 1, 100)

    for error, message, call in [
        (ValueError, "page_size must be a multiple of 16, got 24", lambda: PagePool(4, 24, 1, 16)),
        (ValueError, "pages must be at least 1, got 0", lambda: PagePool(0, 16, 1, 16)),
        (TypeError, "kv_heads must be an int, got float 1.0", lambda: PagePool(4, 16, 1.0, 16)),
        (TypeError, "dtype must be float16", lambda: PagePool(4, 16, 1, 16, dtype=torch.int8)),
        (ValueError, "batch must be an int of at least 1, got 0", lambda: PagedKVCache(A.causal(), pool, 0, 100)),
        (NotImplementedError, "a KV cache drops", lambda: PagedKVCache(A.bidirectional(), pool, 1, 100)),
        (ValueError, r"tokens must be in \[0, 0\], one number or 1 of them; got 1", lambda: empty().crop(1)),
        (ValueError, r"one number or 1 of them; got \[0, 0\]", lambda: empty().crop([0, 0])),
        (TypeError, "tokens must be an int or ints, got 1.5", lambda: empty().crop(1.5)),
        (TypeError, "tokens must be an int or ints, got 'ab'", lambda: empty().crop("ab")),
        (ValueError, r"sequence must be in \[0, 1\), got -1", lambda: empty().reset(-1)),
        (ValueError, "indices must be 1 numbers below 1", lambda: empty().reorder([1])),
    ]:
        with pytest.raises(error, match=message):
            call()
