"""What a pattern costs before attention: arithmetic patterns are nine ints, block masks get two indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen_kernels import BlockMask
from longgen_kernels.benchmark.cases import PATTERNS
from longgen_kernels.benchmark.timing import synchronize

pytest.importorskip("pytest_benchmark")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BLOCK = 128
LENGTHS = [16384, 131072] if GPU else [2048]
HEADS = 32 if GPU else 2


@pytest.mark.benchmark(group="plan of a block mask")
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_block_mask(benchmark: Any, seqlen: int) -> None:
    """From a dense (heads, query blocks, key blocks) tensor on the device."""
    blocks = seqlen // BLOCK
    visible = (torch.rand(HEADS, blocks, blocks, device=DEVICE) < 0.1).tril()
    assert torch.equal(BlockMask.from_dense(visible, block_size=BLOCK).to_dense(), visible)

    def build_and_wait() -> None:
        BlockMask.from_dense(visible, block_size=BLOCK)
        synchronize(DEVICE)

    benchmark.pedantic(build_and_wait, rounds=20, warmup_rounds=2)


@pytest.mark.benchmark(group="plan of an arithmetic pattern")
@pytest.mark.parametrize("name", PATTERNS)
def test_arithmetic_pattern(benchmark: Any, name: str) -> None:
    """All that is made of one for a call: nine ints."""
    assert len(PATTERNS[name].encode()) == 9
    benchmark.pedantic(PATTERNS[name].encode, rounds=20, iterations=100)
