"""How blocks of the Hopper decode kernel share out their merge, compiled for the CPU."""

from __future__ import annotations

import ctypes

import pytest
from host_library import NVCC, compile_for_host

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which compiles csrc for the CPU")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_for_host("cluster_slices.cu", tmp_path_factory.mktemp("slices"))


@pytest.mark.parametrize(
    ("head_dim", "fp8"), [(64, False), (96, False), (128, False), (256, False), (64, True), (128, True)]
)
def test_every_pair_is_sent_once_to_a_place_that_exists(head_dim: int, fp8: bool, library: ctypes.CDLL) -> None:
    assert library.check_slices(head_dim, fp8) == 0
