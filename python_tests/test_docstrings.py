"""The examples in the docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import longgen_kernels

ROOT = Path(longgen_kernels.__path__[0]).parent
MODULES = [
    name
    for package in ("longgen_kernels", "model_integration")
    for name in (
        package,
        *(module.name for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")),
    )
    if name.split(".")[-1] not in ("_C", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("longgen_kernels.kernels.triton"):
        pytest.importorskip("triton")
    if name.startswith("model_integration"):
        pytest.importorskip("transformers")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, "doctest printed what differs"
