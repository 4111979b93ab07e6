"""The ways in which the CUDA decode kernel reads a cache and merges what it found: all give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import PATTERNS, assert_close, new_tokens
from test_kv_cache import model_and_cache, prefill, step

from longgen_kernels import SparseKVCache, longgen_attn_with_kvcache
from longgen_kernels.kernels.cache_problem import SEAT_COUNTS, CacheTensors
from longgen_kernels.kernels.cuda import decode
from longgen_kernels.kernels.cuda.division import Division
from longgen_kernels.kernels.cuda.seating import Seating

WAYS = {  # whether through shared memory, and how the work is divided
    "one split": (True, Division(1)),
    "a cluster of two": (True, Division(2, clustered=True)),
    "a cluster of three": (True, Division(3, clustered=True)),
    "a cluster of eight": (True, Division(8, clustered=True)),
    "through memory": (True, Division(5)),
    "through memory, more splits than are read at once": (True, Division(37)),
    "some tiles whole": (True, Division(5, whole_tiles=3)),
    "some tiles whole, small blocks": (True, Division(3, whole_tiles=2, small_blocks=True)),
    "small blocks with seats": (True, Division(1, small_blocks=True, seats=132)),
    "small blocks": (True, Division(1, small_blocks=True)),
    "small blocks that do not start early": (True, Division(1, small_blocks=True, starts_early=False)),
    "persistent blocks": (True, Division(1, persistent_blocks=132)),
    "three persistent blocks": (True, Division(1, persistent_blocks=3)),
    "more persistent blocks than pairs of chunks": (True, Division(1, persistent_blocks=1000)),
    "with seats": (True, Division(1, seats=132)),
    "with seats, some tiles whole": (True, Division(3, whole_tiles=2, seats=255)),
    "by halves": (True, Division(1, small_blocks=True, seats=1)),
    "by halves, some tiles whole": (True, Division(3, whole_tiles=2, small_blocks=True, seats=2)),
    "to registers": (False, Division(1)),
    "to registers, through memory": (False, Division(6)),
}
ways = pytest.mark.parametrize("way", WAYS)


def skip_without_hopper() -> None:
    if not decode._runs_hopper_code(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("Hopper's own kernel")


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk, division = WAYS[way]
    if bulk:
        skip_without_hopper()
    if not bulk:
        monkeypatch.setattr(decode, "_runs_hopper_code", lambda _: False)
    if 0 < division.seats <= 2:  # by halves: multiprocessors with even and with odd numbers, or all and none
        monkeypatch.setattr(decode, "seating_on", lambda *_: Seating(first_half=(1, 0, 0, 0)))

    def division_of(cache: CacheTensors, *_: Any) -> Division:
        are_small = division.small_blocks and cache.head_dim <= 128 and not cache.is_fp8
        return division if are_small or division.seats > 2 else division._replace(seats=0)

    monkeypatch.setattr(decode, "division_of", division_of)


@pytest.mark.gpu
@ways
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_every_way(way: str, kind: str, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [0, 1, 15, 16, 17, 63, 129, 370]
    model, cache = model_and_cache(PATTERNS[kind], "cuda", poison, batch=len(lengths))
    take(way, monkeypatch)
    prefill(model, cache, lengths, "cuda")
    for n in (1, 1, 2, 9, 16):
        step(model, cache, n, "cuda")
    assert cache.seqlens.tolist() == model.lengths


@pytest.mark.gpu
@ways
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 13])
def test_head_dims_and_groups(
    way: str, head_dim: int, group: int, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = PATTERNS["sink and window"]
    model, _ = model_and_cache(pattern, "cuda", poison)
    model.head_dim = head_dim
    model.reset()
    cache = SparseKVCache(pattern, 2, 2, head_dim, max_seqlen=400, dtype=model.dtype, device="cuda")
    poison(cache.k)
    poison(cache.v)
    take(way, monkeypatch)
    prefill(model, cache, [90, 7], "cuda")
    for n in (1, 3):
        q, k, v = new_tokens(model, n, group * model.kv_heads)
        starts = model.lengths
        model.append(k, v)
        got = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend="cuda")
        assert_close(got, model.attend(q, starts))


@pytest.mark.gpu
@ways
@pytest.mark.parametrize("n", [1, 3])
def test_steps_of_one_cache_in_a_graph(way: str, n: int, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch may start before the one ahead has made the cache longer: it must not keep what it saw then."""
    model, cache = model_and_cache(PATTERNS["strided blocks with per-head phases"], "cuda", poison)
    take(way, monkeypatch)
    prefill(model, cache, [60, 9], "cuda")
    inputs = [new_tokens(model, n, 4) for _ in range(12)]
    before = cache.seqlens.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        longgen_attn_with_kvcache(*inputs[0][:1], cache, backend="cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend="cuda") for q, k, v in inputs]
    cache.seqlens.copy_(before)
    graph.replay()
    for (q, k, v), result in zip(inputs, got, strict=True):
        starts = model.lengths
        model.append(k, v)
        assert_close(result, model.attend(q, starts))
    assert cache.seqlens.tolist() == model.lengths


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["causal", "strided blocks with per-head phases"])
@pytest.mark.parametrize("blocks", [132, 300])
def test_ragged_batches_of_persistent_blocks(
    blocks: int, kind: str, n: int, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 sequences, as many as there may be, from none to thousands of tokens; twice the same bits.

    Of more blocks than run at once, some begin when those that share their first tile have ended.
    """
    monkeypatch.setattr(decode, "division_of", lambda *_: Division(1, persistent_blocks=blocks))
    lengths = [int(3000 * (i / 31) ** 3) for i in range(32)]
    model, cache = model_and_cache(PATTERNS[kind], "cuda", poison, batch=32, max_seqlen=3100)
    prefill(model, cache, lengths, "cuda")
    step(model, cache, n, "cuda")
    q, k, v = new_tokens(model, n, 4)
    other = SparseKVCache.from_state_dict(cache.state_dict())
    first, again = (longgen_attn_with_kvcache(q, c, k, v, return_lse=True, backend="cuda") for c in (cache, other))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("division", "message"),
    [
        (Division(1, small_blocks=True, seats=2), "a seat that there is not"),  # of which half a third one would be
        (Division(1, seats=16), "a seat for each"),
        (Division(1, seats=256), "up to 255"),
        (Division(1, small_blocks=True, seats=256), "up to 255"),
        (Division(1, persistent_blocks=132, seats=132), "nor persistent"),
        (Division(2, clustered=True, seats=132), "neither clustered"),
        (Division(2, whole_tiles=16), "fewer tiles"),
        (Division(2, whole_tiles=-1), "fewer tiles"),
        (Division(2, whole_tiles=1, clustered=True), "neither clustered"),
        (Division(129), "splits"),
        (Division(0), "splits"),
    ],
)
def test_divisions_that_there_cannot_be_are_refused(
    division: Division, message: str, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_hopper()
    model, cache = model_and_cache(PATTERNS["causal"], "cuda", poison, batch=8)
    q = torch.zeros(8, 1, 2 * model.kv_heads, 128, dtype=model.dtype, device="cuda")
    monkeypatch.setattr(decode, "division_of", lambda *_: division)
    monkeypatch.setattr(decode, "seating_on", lambda *_: Seating(first_half=(4, 0, 0, 0)))
    with pytest.raises(ValueError, match=message):
        longgen_attn_with_kvcache(q, cache, backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
@pytest.mark.parametrize("blocks", [3, 7, 16, 20, 29, 132])
def test_equal_tiles_of_persistent_blocks(
    blocks: int, kind: str, n: int, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 tiles and more of one length: each block owns whole ones behind its share of those that are left over; or
    one that others begin."""
    monkeypatch.setattr(decode, "division_of", lambda *_: Division(1, persistent_blocks=blocks))
    model, cache = model_and_cache(PATTERNS[kind], "cuda", poison, batch=8, max_seqlen=2100)
    prefill(model, cache, [2000] * 8, "cuda")
    for _ in range(3):
        step(model, cache, n, "cuda")
    q, k, v = new_tokens(model, n, 4)
    other = SparseKVCache.from_state_dict(cache.state_dict())
    first, again = (longgen_attn_with_kvcache(q, c, k, v, return_lse=True, backend="cuda") for c in (cache, other))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert cache.tickets[:-SEAT_COUNTS].count_nonzero() == 0


def test_one_tokens_keys_and_values_are_not_copied() -> None:
    """RoPE leaves keys (batch, heads, n, head_dim) behind, values come as they were projected."""
    for n, same in ((1, True), (2, False)):
        k = torch.zeros(2, 4, n, 64, dtype=torch.bfloat16).transpose(1, 2)
        v = torch.zeros(2, n, 4, 64, dtype=torch.bfloat16)
        assert k.stride() != v.stride()
        taken = decode._aligned(k, v)
        assert (taken[0] is k and taken[1] is v) == same
        assert same or taken[0].stride() == taken[1].stride()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 3])
def test_keys_and_values_of_two_layouts(n: int, poison: Any) -> None:
    model, cache = model_and_cache(PATTERNS["sink and window"], "cuda", poison, batch=2)
    _, alike = model_and_cache(PATTERNS["sink and window"], "cuda", poison, batch=2)
    for _ in range(3):
        q, k, v = new_tokens(model, n, 4)
        turned = k.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        assert turned.stride() != v.stride()
        out = longgen_attn_with_kvcache(q, cache, turned, v)
        assert torch.equal(out, longgen_attn_with_kvcache(q, alike, k, v))
