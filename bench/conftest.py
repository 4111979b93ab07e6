"""What the pytest-benchmark suites share: `pytest bench`. On a GPU the cases at 16K, elsewhere one tiny case."""

from __future__ import annotations

import functools

import pytest
import torch

from longgen_kernels.benchmark.cases import PATTERNS, Case, Inputs, make_cases, make_inputs
from longgen_kernels.benchmark.gate import Gate
from longgen_kernels.benchmark.peers import Ours
from longgen_kernels.benchmark.prepared import Prepared

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKENDS = ("cuda", "triton") if GPU else ("reference",)
CASES = (
    make_cases(PATTERNS, [16384]) + make_cases(["sink_window", "strided"], [16384], ["gqa", "d64"])
    if GPU
    else make_cases(["strided"], [1280], ["tiny"])
)


@pytest.fixture(params=CASES, ids=lambda case: case.key)
def case(request: pytest.FixtureRequest) -> Case:
    param: Case = request.param
    return param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def prepared(case: Case, backend: str) -> Prepared:
    """The calls of a backend that passed the gate: the test is skipped where it cannot run, and fails if wrong."""
    ours = Ours(backend)
    reason = ours.available(DEVICE) or ours.unsupported(case, DEVICE)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    inputs, gate = _inputs_and_gate(case)
    calls = ours.prepare(case, inputs)
    failure = gate.forward_failure(calls.forward()) or gate.backward_failure(calls.backward())
    assert failure is None, f"not timed, because it is wrong: {failure}"
    return calls


@functools.lru_cache(maxsize=1)
def _inputs_and_gate(case: Case) -> tuple[Inputs, Gate]:
    inputs = make_inputs(case, DEVICE)
    return inputs, Gate(case, inputs)
