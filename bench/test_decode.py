"""Decoding a token through several layers, and appending alone: the bytes per second as extra information."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import decode
from longgen_kernels import SparseKVCache
from longgen_kernels.benchmark.packages import one_line
from longgen_kernels.benchmark.timing import synchronize
from longgen_kernels.kv_cache import explain_append

pytest.importorskip("pytest_benchmark")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = ("mha_2048", "gqa_2048", "mha_9216", "gqa_128K", "strided")
CASES = [decode.CASES[name] for name in NAMES] if GPU else [decode.QUICK]
ROUNDS = {"rounds": 50 if GPU else 5, "warmup_rounds": 3}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def decode_case(request: pytest.FixtureRequest) -> decode.DecodeCase:
    param: decode.DecodeCase = request.param
    return param


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("append", [False, True], ids=["attend", "append and attend"])
def test_decode(benchmark: Any, decode_case: decode.DecodeCase, backend: str, append: bool) -> None:
    """Launched from Python, through more layers than a level-2 cache holds; bench.decode replays a graph instead."""
    try:
        steps = decode.ours(backend, append)(decode_case, DEVICE)
    except NotImplementedError as error:
        pytest.skip(one_line(error))

    def decode_and_wait() -> None:
        for step in steps:
            step()
        synchronize(DEVICE)

    benchmark.pedantic(decode_and_wait, **ROUNDS)
    seconds = benchmark.stats.stats.median / len(steps)
    benchmark.extra_info["microseconds_a_layer"] = seconds * 1e6
    benchmark.extra_info["gigabytes_per_second"] = decode_case.nbytes / seconds / 1e9


@pytest.mark.benchmark(group="append to a cache")
@pytest.mark.parametrize("tokens", [1, 4096] if GPU else [3])
def test_append(benchmark: Any, decode_case: decode.DecodeCase, backend: str, tokens: int) -> None:
    case = decode_case
    cache, expected = (
        SparseKVCache(case.pattern, case.batch, case.kv_heads, case.head_dim, 1 << 20, dtype=case.dtype, device=DEVICE)
        for _ in range(2)
    )
    reason = explain_append(cache)[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    shape = (case.batch, tokens, case.kv_heads, case.head_dim)
    k, v = (torch.randn(shape, dtype=case.dtype, device=DEVICE) for _ in range(2))
    for x in (cache.k, cache.v, expected.k, expected.v):
        x.zero_()
    cache.append(k, v, backend=backend)
    expected.append(k, v, backend="reference")
    for name in ("k", "v", "seqlens"):
        assert torch.equal(getattr(cache, name), getattr(expected, name)), "not timed, because it is wrong"

    def append_and_wait() -> None:
        cache.append(k, v, backend=backend)
        synchronize(DEVICE)

    benchmark.pedantic(append_and_wait, **ROUNDS)
    benchmark.extra_info["gigabytes_per_second"] = 2 * (k.nbytes + v.nbytes) / benchmark.stats.stats.median / 1e9
