"""Merging two attention states: a bandwidth problem, with the bytes per second as extra information."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen_kernels.benchmark.timing import synchronize
from longgen_kernels.merge import explain_merge, merge_attn_states

pytest.importorskip("pytest_benchmark")
GPU = torch.cuda.is_available()
SHAPES = [(1, 16384, 32, 128), (1, 131072, 32, 128), (8, 1, 32, 128)] if GPU else [(1, 256, 4, 64)]


@pytest.mark.benchmark(group="merge")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge(benchmark: Any, backend: str, shape: tuple[int, ...]) -> None:
    device = torch.device("cuda" if GPU else "cpu")
    dtype = torch.bfloat16 if GPU else torch.float32
    batch, seqlen, heads, _ = shape
    outs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    lses = [torch.randn(batch, heads, seqlen, device=device) for _ in range(2)]
    states = outs[0], lses[0], outs[1], lses[1]
    reason = explain_merge(outs[0])[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")

    merged = merge_attn_states(*states, backend=backend)
    expected = merge_attn_states(*(x.double() for x in states), backend="reference")
    plain = merge_attn_states(*states, backend="reference")
    for got, exact, low in zip(merged, expected, plain, strict=True):
        allowed = 2 * (low - exact).abs().max() + 1e-5
        assert (got - exact).abs().max() <= allowed, "not timed, because it is wrong"

    def merge_and_wait() -> None:
        merge_attn_states(*states, backend=backend)
        synchronize(device)

    benchmark.pedantic(merge_and_wait, rounds=50 if GPU else 5, warmup_rounds=3)
    moved = 3 * (outs[0].nbytes + lses[0].nbytes)  # two states in, one out
    benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9
