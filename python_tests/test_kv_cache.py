"""SparseKVCache and attention to it, against a model that keeps everything and masks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import INTERPRETED, random_mask
from cache_model import BF16, BLOCK, FP32, HALF, PATTERNS, A, Everything, assert_close, new_tokens, poisoned
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longgen_kernels import AttentionPattern, SparseKVCache, longgen_attn_func, longgen_attn_with_kvcache
from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.kernels import cuda

PHASES = [p for p in Phase if not (INTERPRETED and p in (Phase.shrink, Phase.explain))]
ON_GPU = torch.cuda.is_available()
BACKENDS = ["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", PATTERNS)
MAX_SEQLEN = 400


def settings_of(backend: str) -> dict[str, Any]:
    """head_dim, dtype and device: small under the interpreter, what the kernel takes on a GPU."""
    if backend == "cuda":
        if cuda.available() is not None:
            pytest.skip(str(cuda.available()))
        return {"head_dim": 128, "dtype": BF16, "device": "cuda"}
    if backend == "triton" and ON_GPU:
        return {"head_dim": 64, "dtype": HALF, "device": "cuda"}
    return {"head_dim": 16, "dtype": FP32, "device": "cpu"}


def model_and_cache(
    pattern: AttentionPattern, backend: str, poison: Any, *, batch: int = 2, kv_heads: int = 2, **options: Any
) -> tuple[Everything, SparseKVCache]:
    sizes = settings_of(backend)
    model = Everything(pattern, batch, kv_heads, **sizes)
    options = {"max_seqlen": MAX_SEQLEN, "dtype": sizes["dtype"], "device": sizes["device"], **options}
    return model, poisoned(SparseKVCache(pattern, batch, kv_heads, sizes["head_dim"], **options), poison)


def step(model: Everything, cache: SparseKVCache, n: int, backend: str, counts: list[int] | None = None) -> None:
    """Appends n random tokens and attends with them; with `counts` only so many of each sequence."""
    q, k, v = new_tokens(model, n, 2 * model.kv_heads)
    starts = model.lengths
    model.append(k, v, counts)
    on_device = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=model.device)
    got = longgen_attn_with_kvcache(q, cache, k, v, counts=on_device, return_lse=True, backend=backend)
    assert_close(got, model.attend(q, starts), counts)


def prefill(model: Everything, cache: SparseKVCache, lengths: list[int], backend: str) -> None:
    n = max(lengths)
    _, k, v = new_tokens(model, n, 1)
    model.append(k, v, lengths)
    counts = torch.tensor(lengths, dtype=torch.int32, device=model.device)
    cache.append(k, v, counts, backend=backend)


# -- layout -----------------------------------------------------------------------------------------------------------


@kinds
def test_every_token_that_a_query_can_see_has_a_slot_of_its_own(kind: str) -> None:
    pattern, heads = PATTERNS[kind], 3
    layout = CacheLayout.compact(pattern, MAX_SEQLEN)
    head = torch.arange(heads)
    slots = layout.slots(MAX_SEQLEN, heads)
    for end in [*range(MAX_SEQLEN), MAX_SEQLEN]:
        held = layout.positions(torch.tensor([end])[:, None], head[None], slots)[0]
        seen = pattern.visible(min(end, 16), end, heads=heads).any(1)  # by any of the last 16 tokens
        for h in range(heads):
            tokens = held[h][held[h] >= 0]
            assert tokens.unique().numel() == tokens.numel()
            assert set(seen[h].nonzero().flatten().tolist()) <= set(tokens.tolist())
            slot = layout.slot(tokens, torch.tensor(h))
            assert torch.equal(held[h][slot], tokens)
            assert layout.permanent_slots(end, h) <= slots - (layout.ring or 0)


def test_a_long_sequence_needs_no_more_than_sink_window_and_a_block() -> None:
    pattern = A.sink_window(sink=128, window=2048)
    assert CacheLayout.compact(pattern).slots(131072, kv_heads=32) <= 2304
    strided = A.strided(16, 64, window=1024)
    assert CacheLayout.compact(strided).slots(131072, kv_heads=32) <= 131072 // 16 + 64 + 1024 + 32
    assert CacheLayout.compact(A.causal()).slots(131072, kv_heads=32) == 131072


def test_a_schedule_with_full_layers_uses_a_third_of_the_memory() -> None:
    """Eleven of 32 layers full: what the allocator gives, at a sixteenth of Llama-2-7B's width."""
    device = "cuda" if ON_GPU else "cpu"

    def allocated(pattern: AttentionPattern) -> int:
        before = torch.cuda.memory_allocated() if ON_GPU else 0
        cache = SparseKVCache(pattern, batch=1, kv_heads=2, head_dim=128, max_seqlen=131072, device=device)
        tensors = [x for x in vars(cache).values() if isinstance(x, torch.Tensor)]  # lengths and counters too
        held = sum(x.untyped_storage().nbytes() for x in tensors)
        assert cache.nbytes <= held
        return torch.cuda.memory_allocated() - before if ON_GPU else held

    full = allocated(A.causal())
    sparse = allocated(A.sink_window(sink=128, window=2048))
    assert 0 <= full - 2 * 131072 * 2 * 128 * 2 < 1 << 16
    assert 11 * full + 21 * sparse <= 0.36 * 32 * full


# -- decoding around every boundary -----------------------------------------------------------------------------------


def lengths_around_boundaries(pattern: AttentionPattern) -> list[int]:
    layout = CacheLayout.compact(pattern, MAX_SEQLEN)
    window, ring = min(layout.window_tokens, 100), layout.ring or BLOCK
    edges = [BLOCK, window, ring, 2 * ring, 3 * ring, min(pattern.sink, 100)]
    near = {0, 1, *(edge + d for edge in edges for d in (-1, 0, 1))}
    return sorted(n for n in near if 0 <= n <= MAX_SEQLEN - 17)


@backends
@kinds
def test_decoding_after_a_prompt_of_a_critical_length(kind: str, backend: str, poison: Any) -> None:
    pattern = PATTERNS[kind]
    lengths = lengths_around_boundaries(pattern)
    # One sequence of the batch for each length.
    model, cache = model_and_cache(pattern, backend, poison, batch=len(lengths))
    prefill(model, cache, lengths, backend)
    for n in (1, 3, 13):
        step(model, cache, n, backend)
    assert cache.seqlens.tolist() == model.lengths


@backends
@kinds
def test_a_prompt_in_chunks_of_random_sizes_is_one_long_prompt(kind: str, backend: str, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS[kind], backend, poison)
    seen, longest = 0, 96 if INTERPRETED and backend == "triton" else 300
    rest = "auto" if backend == "cuda" else backend
    while seen < longest:
        n = random.choice([1, 2, 15, 16, 17, 33, 64])
        step(model, cache, n, backend if n <= 16 else rest)
        seen += n


@backends
def test_a_batch_of_different_lengths(backend: str, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS["strided blocks with per-head phases"], backend, poison, batch=4)
    for n, counts in ((9, [9, 0, 1, 5]), (16, [3, 16, 0, 16]), (1, [1, 0, 1, 1]), (12, [0, 0, 12, 7]), (2, None)):
        step(model, cache, n, backend, counts)
    assert cache.seqlens.tolist() == model.lengths


@backends
@pytest.mark.parametrize("group", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_groups_and_numbers_of_query_tokens(group: int, n: int, backend: str, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS["sink and window"], backend, poison)
    prefill(model, cache, [90, 7], backend)
    q, k, v = new_tokens(model, n, group * model.kv_heads)
    starts = model.lengths
    model.append(k, v)
    got = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend=backend)
    assert_close(got, model.attend(q, starts))


@backends
def test_queries_of_tokens_that_are_in_the_cache_already(backend: str, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS["sink and window"], backend, poison, batch=3)
    prefill(model, cache, [150, 0, 5], backend)
    for n in (1, 16):  # more than two of the sequences have tokens
        q = new_tokens(model, n, 4)[0]
        got = longgen_attn_with_kvcache(q, cache, return_lse=True, backend=backend)
        assert_close(got, model.attend(q, [length - n for length in model.lengths]))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [HALF] if INTERPRETED else [HALF, BF16], ids=str)
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_head_dims(head_dim: int, dtype: torch.dtype, backend: str, poison: Any) -> None:
    settings_of(backend)
    device = "cuda" if ON_GPU else "cpu"
    pattern = PATTERNS["strided blocks with per-head phases"]
    model = Everything(pattern, 2, 2, head_dim, dtype, device)
    cache = poisoned(SparseKVCache(pattern, 2, 2, head_dim, MAX_SEQLEN, dtype=dtype, device=device), poison)
    prefill(model, cache, [130, 31], backend)
    for n in (1, 9):
        step(model, cache, n, backend)


def test_strides_of_new_tokens_are_free(poison: Any) -> None:
    """Slices of a fused projection, heads first in memory."""
    for backend in ("reference", "triton"):
        model, cache = model_and_cache(PATTERNS["sink and window"], backend, poison)
        for n in (20, 3):
            fused = torch.randn(2, 8, n, model.head_dim, device=model.device).to(model.dtype).transpose(1, 2)
            q, k, v = fused.split([4, 2, 2], dim=2)
            starts = model.lengths
            model.append(k, v)
            got = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend=backend)
            assert_close(got, model.attend(q, starts))


# -- sequences of operations ------------------------------------------------------------------------------------------

OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 40)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("ragged"), st.lists(st.integers(0, 20), min_size=3, max_size=3)),
    st.tuples(st.just("append"), st.integers(1, 70)),
    st.tuples(st.just("look"), st.integers(1, 4)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("ragged crop"), st.lists(st.integers(0, 8), min_size=3, max_size=3)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("reload"), st.just(0)),
)


@pytest.mark.parametrize("backend", ["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(data=st.data())
@settings(max_examples=12 if INTERPRETED else 200, phases=PHASES, print_blob=True)
def test_any_sequence_of_operations(backend: str, poison: Any, tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(PATTERNS)))
    few = INTERPRETED and backend == "triton"
    model, cache = model_and_cache(PATTERNS[kind], backend, poison, batch=3, max_seqlen=20, grows=True)
    rest = "auto" if backend == "cuda" else backend
    for name, argument in data.draw(st.lists(OPERATIONS, min_size=3, max_size=5 if few else 20)):
        cropped = cache._cropped
        if name == "step":
            step(model, cache, argument, backend if argument <= 16 else rest)
        elif name == "ragged":
            step(model, cache, max(argument), backend if max(argument) <= 16 else rest, argument)
        elif name == "append":
            _, k, v = new_tokens(model, argument, 1)
            model.append(k, v)
            cache.append(k, v, backend=rest)
        elif name == "look" and cropped == 0:
            q = new_tokens(model, argument, 4)[0]
            got = longgen_attn_with_kvcache(q, cache, return_lse=True, backend=backend)
            assert_close(got, model.attend(q, [length - argument for length in model.lengths]))
        elif name == "crop" and cropped + argument <= 16 and argument <= max(model.lengths):
            model.crop([argument] * 3)
            cache.crop(argument)
        elif name == "ragged crop" and cropped + max(argument) <= 16:
            model.crop(argument)
            cache.crop(torch.tensor(argument, dtype=torch.int32, device=model.device), at_most=max(argument))
        elif name == "reorder":
            model.reorder(argument)
            cache.reorder(torch.tensor(argument, device=model.device))
        elif name == "reset":
            model.reset()
            cache.reset()
        elif name == "reload":
            cache.save(tmp_path / "cache.pt")
            cache = SparseKVCache.load(tmp_path / "cache.pt")
        assert cache.seqlens.tolist() == model.lengths
        assert not cache.equal_lengths or len(set(model.lengths)) == 1
    step(model, cache, 1, backend)


# -- the cache's own functions ----------------------------------------------------------------------------------------


def test_whether_lengths_are_equal_is_known_to_the_host(tmp_path: Path) -> None:
    """Until sequences get different numbers of tokens, and again once they are empty; a single one is."""

    def cache_of(batch: int) -> SparseKVCache:
        return SparseKVCache(A.causal(), batch, 1, 16, max_seqlen=40, dtype=FP32)

    def ragged(cache: SparseKVCache) -> SparseKVCache:
        cache.append(*new, counts=torch.tensor([2, 5], dtype=torch.int32))
        return cache

    new = torch.randn(2, 5, 1, 16), torch.randn(2, 5, 1, 16)
    cache = cache_of(2)
    cache.append(*new)
    cache.crop(2)
    cache.reorder(torch.tensor([1, 1]))
    cache.save(tmp_path / "equal.pt")
    ragged(cache).save(tmp_path / "ragged.pt")
    cropped = cache_of(2)
    cropped.append(*new)
    cropped.crop(torch.tensor([2, 0], dtype=torch.int32), at_most=2)
    for other in (cache, cropped, SparseKVCache.load(tmp_path / "ragged.pt")):
        assert not other.equal_lengths
        assert not other.tensors.equal_lengths
    assert SparseKVCache.load(tmp_path / "equal.pt").equal_lengths
    cache.reset()
    assert cache.equal_lengths
    assert cache.tensors.equal_lengths
    one = cache_of(1)
    one.append(new[0][:1], new[1][:1], counts=torch.tensor([3], dtype=torch.int32))
    assert one.equal_lengths
    state = ragged(cache_of(2)).state_dict()
    del state["equal"]  # as in files of before it was known
    assert not SparseKVCache.from_state_dict(state).equal_lengths


def test_cropping_further_than_the_ring_reaches_says_so() -> None:
    cache = SparseKVCache(A.sink_window(4, 20), 1, 1, 16, 200, dtype=FP32)
    x = torch.randn(1, 30, 1, 16)
    cache.append(x, x)
    cache.crop(30)  # nothing has been overwritten
    cache.reset()
    for _ in range(3):
        cache.append(x, x)
    cache.crop(16)
    with pytest.raises(ValueError, match=r"16 tokens having been cropped, may need keys .* overwritten; at most 29"):
        cache.crop(14)
    cache.append(x, x)
    cache.crop(29)
    assert cache.seqlens.tolist() == [75]


def test_queries_further_back_than_the_ring_reaches_say_so() -> None:
    cache = SparseKVCache(A.sink_window(4, 20), 1, 1, 16, 200, dtype=FP32)
    x = torch.randn(1, 50, 1, 16)
    cache.append(x, x)
    assert longgen_attn_with_kvcache(x[:, :29], cache).shape == (1, 29, 1, 16)
    with pytest.raises(ValueError, match="a query 30 tokens before the end may need keys"):
        longgen_attn_with_kvcache(x[:, :30], cache)


def test_a_cache_grows_geometrically_and_keeps_what_it_had(poison: Any) -> None:
    for kind in ("sink and window", "strided blocks with per-head phases", "causal"):
        model, cache = model_and_cache(PATTERNS[kind], "reference", poison, max_seqlen=2, grows=True)
        sizes = set()
        for _ in range(100):
            step(model, cache, 1, "reference")
            sizes.add(cache.max_seqlen)
        assert sorted(sizes) == [2, 4, 8, 16, 32, 64, 128]


def test_a_full_cache_says_so_before_anything_is_written() -> None:
    cache = SparseKVCache(A.sink_window(4, 20), 1, 1, 16, 10, dtype=FP32)
    x = torch.randn(1, 11, 1, 16)
    with pytest.raises(ValueError, match="11 more tokens than 0 would pass max_seqlen=10"):
        cache.append(x, x)
    with pytest.raises(ValueError, match="would pass max_seqlen=10"):
        longgen_attn_with_kvcache(x, cache, x, x)
    assert cache.seqlens.tolist() == [0]


def test_tokens_kept_and_bytes() -> None:
    pattern = A.strided(4, BLOCK, window=20, sink=4)
    cache = SparseKVCache(pattern, 2, 4, 16, 1000, dtype=HALF)
    x = torch.randn(2, 1000, 4, 16, dtype=HALF)
    cache.append(x, x, torch.tensor([1000, 3], dtype=torch.int32), backend="reference")
    kept = cache.tokens_kept()
    assert kept[1].tolist() == [3] * 4
    for head in range(4):
        assert pattern.kept_tokens(1000, head) <= int(kept[0, head]) <= cache.slots
    assert cache.nbytes == 2 * 2 * 4 * cache.slots * 16 * 2


@pytest.mark.parametrize("pattern", [A.bidirectional(), random_mask(4, 4, 16)], ids=["bidirectional", "block mask"])
def test_patterns_that_may_show_a_key_again_are_refused(pattern: Any) -> None:
    with pytest.raises(NotImplementedError, match="a KV cache drops what no later query sees"):
        SparseKVCache(pattern, 1, 1, 16, 100)


@pytest.mark.parametrize("steps", [300, pytest.param(200_000, marks=pytest.mark.gpu)])
def test_soak(steps: int, poison: Any) -> None:
    """Many tokens through one cache, compared at random steps; its memory stays what it was."""
    pattern = A.strided(16, 64, window=100, sink=4) if steps > 1000 else PATTERNS["small strided blocks"]
    backend = "auto" if ON_GPU else "reference"
    model, cache = model_and_cache(pattern, "triton" if ON_GPU else "reference", poison, batch=1, max_seqlen=steps)
    keys, values, sizes = [], [], []
    checked = {0, *random.sample(range(steps), 20)}
    for i in range(steps):
        q, k, v = new_tokens(model, 1, 4)
        got = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend=backend)
        keys.append(k[0].cpu())
        values.append(v[0].cpu())
        if i in checked:
            model.k, model.v = ([torch.cat(x).to(model.device)] for x in (keys, values))
            assert_close(got, model.attend(q, [i]))
            model.reset()
            sizes.append((cache.nbytes, cache.k.data_ptr(), torch.cuda.memory_allocated() if ON_GPU else 0))
    assert len(set(sizes)) == 1


def test_equals_attention_over_the_whole_sequence() -> None:
    """The public functions side by side: one call over everything, and one token at a time."""
    pattern = A.sink_window(4, 30)
    q, k, v = (torch.randn(1, 120, heads, 32) for heads in (4, 2, 2))
    cache = SparseKVCache(pattern, 1, 2, 32, 120, dtype=FP32)
    rows = [longgen_attn_with_kvcache(*(x[:, i : i + 1] for x in (q,)), cache, k[:, i : i + 1], v[:, i : i + 1])
            for i in range(120)]  # fmt: skip
    torch.testing.assert_close(torch.cat(rows, 1), longgen_attn_func(q, k, v, pattern))
