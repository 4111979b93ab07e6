"""What every test shares: GPU skipping, Triton's interpreter where there is no GPU, seeds, poisoned memory."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton decides when a kernel is decorated, so this comes before anything imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("default", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)  # what a GPU runs: new examples each time
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "thorough" if HAS_GPU else "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU that torch.cuda can use")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds_and_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same random numbers in every run; a LONGGEN_BACKEND of the developer's shell does not reach the tests."""
    random.seed(0)
    torch.manual_seed(0)
    monkeypatch.delenv("LONGGEN_BACKEND", raising=False)


@pytest.fixture
def triton_device() -> str:
    """Where Triton kernels run in this process: the GPU, or the CPU under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every fresh buffer holds NaN (integers: their largest value) while the test runs, so that what a kernel reads
    without having written, or does not write, shows. The value is the function that poisons a tensor in place."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    return _fill_with_poison


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _fill_with_poison(allocate(*args, **kwargs))

    return allocate_poisoned


def _fill_with_poison(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
