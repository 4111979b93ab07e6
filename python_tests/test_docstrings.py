"""The examples in the docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import longgen_kernels

MODULES = [
    "longgen_kernels",
    *(
        module.name
        for module in pkgutil.walk_packages(longgen_kernels.__path__, "longgen_kernels.")
        if module.name.split(".")[-1] not in ("_C", "__main__")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("longgen_kernels.kernels.triton"):
        pytest.importorskip("triton")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0, "doctest printed what differs"
