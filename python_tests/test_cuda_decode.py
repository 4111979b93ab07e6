"""The ways in which the CUDA decode kernel reads a cache and merges what it found: all give the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cache_model import PATTERNS, assert_close, new_tokens
from test_kv_cache import model_and_cache, prefill, step
from torch import Tensor

from longgen_kernels import SparseKVCache, longgen_attn_with_kvcache
from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.kernels.cache_problem import SEAT_COUNTS, CacheTensors
from longgen_kernels.kernels.cuda import decode, seating
from longgen_kernels.kernels.cuda.division import Division, division_of

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
    "with seats, through memory": (True, Division(3, seats=255)),
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
    monkeypatch.setattr(decode, "division_of", lambda *_: division)


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


def cache_of(
    kv_heads: int, slots: int, batch: int = 1, kind: str = "causal", equal_lengths: bool = False
) -> CacheTensors:
    k = torch.empty(batch, kv_heads, slots, 128, dtype=torch.bfloat16, device="meta")
    lengths = torch.zeros(batch, dtype=torch.int32, device="meta")
    return CacheTensors(k, k, lengths, CacheLayout.compact(PATTERNS[kind]), equal_lengths=equal_lengths)


def divided(cache: CacheTensors, rows: int = 8, bulk: bool = True) -> Division:
    """On a GPU of 132 multiprocessors."""
    return division_of(cache, cache.batch * cache.kv_heads, rows, 132, bulk)


CLUSTER_OF_2, CLUSTER_OF_8 = (Division(splits, clustered=True) for splits in (2, 8))
SMALL, SMALL_AND_LATE = (Division(1, small_blocks=True, starts_early=early) for early in (True, False))
PERSISTENT = Division(1, persistent_blocks=132)
SEATED, SEATED_2, SEATED_3, SEATED_4 = (Division(splits, seats=132) for splits in (1, 2, 3, 4))
SEATED_SMALL = Division(1, small_blocks=True, seats=132)


@pytest.mark.parametrize(
    ("kv_heads", "slots", "want"),
    [
        (8, 2064, CLUSTER_OF_8),
        (32, 2064, CLUSTER_OF_2),
        (16, 2064, Division(8)),  # clusters of four would be uneven
        (8, 9232, Division(16)),
        (1, 2064, CLUSTER_OF_8),
        (1, 32784, Division(65)),  # on half of the multiprocessors, one of each pair
        (32, 9232, Division(4)),
        (8, 131072, Division(16)),
        (64, 64, Division(1)),
        (132, 9232, Division(1)),
        (184, 2064, PERSISTENT),  # small blocks would fill less than 3/4 of their places
        (198, 2064, SEATED_SMALL),
        (198, 9232, SEATED_SMALL),
        (160, 9232, PERSISTENT),
        (100, 9232, SEATED),
        (100, 2064, SEATED),  # for less than it takes them to begin and to merge
        (120, 2064, SEATED),
        (124, 2064, Division(1)),  # which eight multiprocessors are idle matters little
        (40, 9232, SEATED_3),
        (40, 2064, Division(3)),  # what is short does not wait for seats
        (28, 9232, SEATED_4),
        (36, 9232, SEATED_3),
        (64, 9232, Division(2)),
        (132, 32768, Division(1)),
        (32, 131072, SEATED_3),
        (256, 2064, SMALL),
        (264, 9232, SMALL_AND_LATE),
        (512, 9232, SMALL),
        (384, 9232, Division(2, whole_tiles=252, small_blocks=True)),
        (1024, 2064, SMALL),
        (288, 2064, Division(8, whole_tiles=255, small_blocks=True)),  # the last 33 in 264 pieces
        (416, 4112, Division(2, whole_tiles=284, small_blocks=True)),
        (448, 2064, Division(4, whole_tiles=382, small_blocks=True)),
        (496, 2064, SMALL),  # the second round is nearly full
        (576, 2064, SMALL),  # after two blocks begin at all times
        (8, 139264, Division(16)),
    ],
)
def test_how_work_is_divided(kv_heads: int, slots: int, want: Division) -> None:
    """Clusters on half of the multiprocessors, blocks on nearly all, seats where some stay idle, small blocks for many
    tiles, and persistent ones for what is long or does not come out even."""
    assert divided(cache_of(kv_heads, slots)) == want
    division = divided(cache_of(kv_heads, slots), bulk=False)
    assert division == Division(division.splits)


@pytest.mark.parametrize(
    ("kind", "batch", "kv_heads", "slots", "want"),
    [
        ("causal", 8, 8, 131072, PERSISTENT),
        ("causal", 8, 8, 9232, PERSISTENT),
        ("strided blocks", 8, 8, 9232, Division(2)),  # sequences of whatever length keep about as much
        ("causal", 8, 8, 2064, Division(1)),
        ("causal", 8, 32, 9232, SMALL_AND_LATE),
        ("causal", 8, 32, 32768, PERSISTENT),
        ("causal", 32, 32, 131072, PERSISTENT),
        ("causal", 33, 32, 131072, SMALL),  # a lane of a warp knows the length of one sequence
    ],
)
def test_how_sequences_that_may_differ_in_length_are_divided(
    kind: str, batch: int, kv_heads: int, slots: int, want: Division
) -> None:
    assert divided(cache_of(kv_heads, slots, batch, kind)) == want


@pytest.mark.parametrize(
    ("rows", "batch", "kv_heads", "slots", "want"),
    [
        (8, 8, 8, 131072, PERSISTENT),
        (8, 8, 8, 32768, Division(2)),
        (8, 8, 32, 32768, SMALL_AND_LATE),
        (8, 4, 32, 32768, Division(1)),
        (16, 8, 8, 131072, PERSISTENT),
        (16, 8, 8, 32768, Division(2)),
        (16, 8, 1, 131072, Division(16)),
        (16, 5, 8, 32768, SEATED_3),
        (8, 12, 8, 4112, SEATED),
        (8, 9, 8, 4112, SEATED),
        (8, 9, 8, 9232, SEATED),
        (16, 1, 48, 2064, SEATED_2),  # persistent blocks need longer for more rows
        (16, 36, 8, 2064, Division(8, whole_tiles=255, small_blocks=True)),
        (16, 48, 8, 2064, Division(2, whole_tiles=252, small_blocks=True)),
        (16, 48, 8, 4112, Division(1)),  # big blocks, whose rounds cost less if they are long
        (16, 52, 8, 2064, Division(2, whole_tiles=304, small_blocks=True)),
        (16, 52, 8, 4112, Division(2, whole_tiles=284, small_blocks=True)),
        (16, 54, 8, 4112, Division(3, whole_tiles=396)),
        (16, 56, 8, 4112, Division(3, whole_tiles=408, small_blocks=True)),  # 264, then 144 and 40 in 120 pieces
        (16, 60, 8, 2064, Division(2, whole_tiles=432, small_blocks=True)),  # 264, then 168 and 48 in 96 pieces
        (16, 64, 8, 2064, SMALL),
    ],
)
def test_how_sequences_of_one_length_are_divided(
    rows: int, batch: int, kv_heads: int, slots: int, want: Division
) -> None:
    assert divided(cache_of(kv_heads, slots, batch, equal_lengths=True), rows) == want


def test_persistent_blocks_leave_plain_tensors_of_a_sparse_pattern_alone() -> None:
    cache = cache_of(8, 131072, 8, "strided blocks")
    assert divided(cache) == PERSISTENT
    plain = cache._replace(layout=CacheLayout(PATTERNS["strided blocks"]))
    assert divided(plain) == Division(2)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "slots", "want"),
    [
        (14, 8, 4112, Division(1)),  # no seats: what is read has to be converted, which takes longer
        (9, 8, 4112, PERSISTENT),
        (1, 32, 2064, Division(4)),
        (1, 8, 2064, CLUSTER_OF_8),
        (1, 5, 9232, Division(25)),
    ],
)
def test_how_fp8_caches_are_divided(batch: int, kv_heads: int, slots: int, want: Division) -> None:
    cache = cache_of(kv_heads, slots, batch, equal_lengths=True)
    k = torch.empty(cache.k.shape, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.ones(kv_heads, device="meta")
    fp8 = cache._replace(k=k, v=k, k_scale=scale, v_scale=scale, given_dtype=torch.bfloat16)
    assert divided(fp8) == want


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


def seated_steps() -> tuple[list[Callable[[], Tensor]], list[Tensor], list[SparseKVCache]]:
    """Steps of caches of several sizes whose blocks take seats, what each gives, and the caches."""
    steps, want, caches = [], [], []
    for batch, kv_heads, splits, small in (
        (15, 8, 1, False),
        (5, 8, 3, False),
        (1, 100, 1, False),
        (2, 2, 5, False),
        (25, 8, 1, True),
        (1, 140, 1, True),
    ):
        pattern = PATTERNS["sink and window"]
        cache = SparseKVCache(pattern, batch, kv_heads, 128, max_seqlen=9000, dtype=torch.bfloat16, device="cuda")
        cache.k.normal_()
        cache.v.normal_()
        cache.seqlens.copy_(torch.arange(batch) * 37 + 300)
        q = torch.randn(batch, 1, 4 * kv_heads, 128, dtype=torch.bfloat16, device="cuda")

        def run(q: Tensor, cache: SparseKVCache, division: Division) -> Tensor:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decode, "division_of", lambda *_: division)
                return longgen_attn_with_kvcache(q, cache, backend="cuda")

        division = Division(splits, small_blocks=small)
        want.append(run(q, cache, division))
        steps.append(partial(run, q, cache, division._replace(seats=132)))
        caches.append(cache)
    return steps, want, caches


@pytest.mark.gpu
def test_seats_of_launches_that_run_at_once() -> None:
    """Blocks then come to multiprocessors whose seats are taken, and take those that are left."""
    skip_without_hopper()
    steps, want, caches = seated_steps()
    streams = [torch.cuda.Stream() for _ in steps]
    torch.cuda.synchronize()
    got = []
    for _ in range(100):
        for run, stream, right in zip(steps, streams, want, strict=True):
            with torch.cuda.stream(stream):
                got.append((run(), right))
    torch.cuda.synchronize()
    assert all(torch.equal(x, right) for x, right in got)
    for cache in caches:
        tickets, counts = cache.tickets[: -2 * SEAT_COUNTS], cache.tickets[-2 * SEAT_COUNTS :].view(2, -1)
        assert tickets.count_nonzero() == 0
        are_small = cache.k.shape[0] * cache.k.shape[1] > 132
        for each, of_size in ((2 * are_small, counts[0]), (1 - are_small, counts[1])):
            assert of_size.tolist() == [100 * each * 132] + [100 * each] * 132 + [0] * (SEAT_COUNTS - 133)


@pytest.mark.gpu
@pytest.mark.parametrize("multiprocessors", [8, 64])
def test_seats_on_a_part_of_the_gpu(multiprocessors: int) -> None:
    """More seats than blocks that run at once, all of which may have nothing to do."""
    skip_without_hopper()
    contexts = pytest.importorskip("torch.cuda.green_contexts")
    steps, want, _ = seated_steps()
    torch.cuda.synchronize()
    context = contexts.GreenContext.create(num_sms=multiprocessors, device_id=torch.cuda.current_device())
    context.set_context()
    try:
        got = [(run(), right) for _ in range(5) for run, right in zip(steps, want, strict=True)]
        torch.cuda.synchronize()
    finally:
        context.pop_context()
    assert all(torch.equal(x, right) for x, right in got)


@pytest.mark.gpu
def test_halves_of_the_gpu_are_measured_alike_again() -> None:
    skip_without_hopper()
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.get_device_properties(device).multi_processor_count
    halves = []
    for _ in range(3):
        with device:  # as the default device
            measurement = seating._Measurement(device, count)
        torch.cuda.synchronize()
        assert sorted(measurement.order()) == list(range(count))
        seen = seating._halves(measurement.latencies.double())
        assert seen is not None
        halves.append(seen.is_first)
    assert count / 3 < halves[0].sum() < count * 2 / 3
    assert all(torch.equal(x, halves[0]) for x in halves)


@pytest.mark.gpu
def test_seats_in_a_graph_before_the_halves_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_hopper()
    steps, want, _ = seated_steps()
    monkeypatch.setattr(seating, "_measurements", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [run() for run in steps]
    assert not seating._measurements
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(x, right) for x, right in zip(got, want, strict=True))
    for _ in range(20):  # as they become known
        assert all(torch.equal(run(), right) for run, right in zip(steps, want, strict=True))
    assert all(measurement.order() for measurement in seating._measurements.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("division", "message"),
    [
        (Division(1, seats=16), "a seat for each"),
        (Division(1, seats=256), "up to 255"),
        (Division(1, small_blocks=True, seats=256), "up to 255"),
        (Division(1, small_blocks=True, seats=7), "a seat for each"),
        (Division(1, persistent_blocks=132, seats=132), "nor persistent"),
        (Division(2, clustered=True, seats=132), "neither clustered"),
        (Division(2, whole_tiles=16), "fewer tiles"),
        (Division(2, whole_tiles=-1), "fewer tiles"),
        (Division(2, whole_tiles=1, clustered=True), "without seats"),
        (Division(2, whole_tiles=1, seats=132), "without seats"),
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
