"""Forward and backward over the cases, with the useful TFLOP/s as extra information."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longgen_kernels.benchmark.cases import Case
from longgen_kernels.benchmark.prepared import Prepared
from longgen_kernels.benchmark.timing import synchronize

pytest.importorskip("pytest_benchmark")


@pytest.mark.benchmark(group="forward")
def test_forward(benchmark: Any, case: Case, prepared: Prepared) -> None:
    _time(benchmark, case, "fwd", prepared.forward)


@pytest.mark.benchmark(group="backward")
def test_backward(benchmark: Any, case: Case, prepared: Prepared) -> None:
    _time(benchmark, case, "bwd", prepared.backward)


def _time(benchmark: Any, case: Case, which: str, call: Callable[[], object]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def call_and_wait() -> None:
        call()
        synchronize(device)

    rounds = 30 if device.type == "cuda" else 3
    benchmark.pedantic(call_and_wait, rounds=rounds, warmup_rounds=3 if device.type == "cuda" else 1)
    benchmark.extra_info["case"] = case.to_dict()
    benchmark.extra_info["useful_tflops"] = case.flops(which) / benchmark.stats.stats.median / 1e12
