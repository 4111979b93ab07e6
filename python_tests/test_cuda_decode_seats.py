"""Which multiprocessors do what the decode kernel's blocks are given out for: seats, and halves of the GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cache_model import PATTERNS
from torch import Tensor

from longgen_kernels import AttentionPattern, SparseKVCache, longgen_attn_with_kvcache
from longgen_kernels.kernels.cache_problem import SEAT_COUNTS
from longgen_kernels.kernels.cuda import decode, seating
from longgen_kernels.kernels.cuda.decode import _seats
from longgen_kernels.kernels.cuda.division import Division
from longgen_kernels.kernels.cuda.seating import UNKNOWN, Seating, Words


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's own kernel")


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
    device = torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.get_device_properties(device).multi_processor_count
    halves, fast = [], []
    for _ in range(3):
        with device:  # as the default device
            measurement = seating._Measurement(device, count)
        torch.cuda.synchronize()
        assert sorted(measurement.seating().idle_order) == list(range(count))
        seen = seating._halves(measurement.latencies.double())
        assert seen is not None
        halves.append(seen.is_first)
        fast.append(measurement.rates > seating._FAST * measurement.rates.median())
        assert (measurement.rates > 0).all()
    assert count / 3 < halves[0].sum() < count * 2 / 3
    assert torch.equal(fast[0][::2], fast[0][1::2])
    assert fast[0].sum() < count / 3
    for measured in (halves, fast):
        assert all(torch.equal(x, measured[0]) for x in measured)


@pytest.mark.gpu
def test_seats_in_a_graph_before_the_halves_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert all(measurement.seating().idle_order for measurement in seating._measurements.values())


def where_halves_differ(patch: pytest.MonkeyPatch, first_half: Words) -> None:
    patch.setattr(decode, "seating_on", lambda *_: Seating(first_half=first_half, halves_differ=True))


@pytest.mark.gpu
@pytest.mark.parametrize("first", [1, 0, 3])  # one of two; all are in one half
@pytest.mark.parametrize(("whole", "splits"), [(0, 1), (0, 3), (37, 2)])
def test_halves_of_launches_that_run_at_once(
    whole: int, splits: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one half's blocks do not come in time, or there is none, others do what it has to."""
    pattern = PATTERNS["sink and window"]
    where_halves_differ(monkeypatch, (first, 0, 0, 0))
    division = Division(splits, whole_tiles=whole, small_blocks=True)
    caches, queries = [], []
    for batch in (7, 40):
        cache = SparseKVCache(pattern, batch, 8, 128, max_seqlen=9000, dtype=torch.bfloat16, device="cuda")
        cache.k.normal_()
        cache.v.normal_()
        cache.seqlens.copy_(torch.arange(batch) * 37 + 300)
        caches.append(cache)
        queries.append(torch.randn(batch, 1, 64, 128, dtype=torch.bfloat16, device="cuda"))
    monkeypatch.setattr(decode, "division_of", lambda *_: division)
    want = [longgen_attn_with_kvcache(q, cache, backend="cuda") for q, cache in zip(queries, caches, strict=True)]
    monkeypatch.setattr(decode, "division_of", lambda *_: division._replace(seats=2))
    streams = [torch.cuda.Stream() for _ in caches]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for q, cache, stream, right in zip(queries, caches, streams, want, strict=True):
            with torch.cuda.stream(stream):
                got.append((longgen_attn_with_kvcache(q, cache, backend="cuda"), right))
    torch.cuda.synchronize()
    assert all(torch.equal(x, right) for x, right in got)
    assert all(cache.tickets.count_nonzero() == 0 for cache in caches)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "group", "window"), [(56, 16, 240), (60, 4, 3000), (58, 4, 4000), (61, 16, 4000), (57, 1, 4000)]
)
def test_who_does_what_changes_no_bit(batch: int, group: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where halves are unknown, and where they differ: with append, and in a graph that is replayed while the cache
    grows."""
    pattern = AttentionPattern.sink_window(sink=96, window=window)
    q = torch.randn(batch, 1, 8 * group, 128, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, batch, 1, 8, 128, dtype=torch.bfloat16, device="cuda")
    results = []
    for known in (UNKNOWN, Seating(first_half=(0x1111222244447777,) * 2 + (0xF, 0), halves_differ=True)):
        torch.manual_seed(0)
        cache = SparseKVCache(pattern, batch, 8, 128, max_seqlen=9000, dtype=torch.bfloat16, device="cuda")
        cache.k.normal_()
        cache.v.normal_()
        cache.seqlens.copy_(torch.arange(batch) * 53 + 300)
        seats = []

        def spied(*arguments: Any, seats: list[int] = seats) -> Any:
            taken = _seats(*arguments)
            seats.append(taken.number)
            return taken

        with monkeypatch.context() as patch:
            patch.setattr(decode, "seating_on", lambda *_, known=known: known)
            patch.setattr(decode, "_seats", spied)
            out = longgen_attn_with_kvcache(q, cache, k, v, backend="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = longgen_attn_with_kvcache(q, cache, k, v, backend="cuda")
        assert seats == [0 if known is UNKNOWN else 132] * 2
        for _ in range(5):
            graph.replay()
        results.append((out, again, cache.k, cache.v, cache.seqlens))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
