"""Host time of one eager call: what a layer pays before its kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longgen_kernels import AttentionPattern, longgen_attn_func
from longgen_kernels.benchmark.peers import Ours
from longgen_kernels.patterns import BlockMask

pytest.importorskip("pytest_benchmark")
PATTERNS = {
    "causal": AttentionPattern.causal(),
    "strided": AttentionPattern.strided(16, 64, window=1024),
    "block_mask": BlockMask.from_dense(torch.ones(1, 1, 1, dtype=torch.bool), block_size=64),
}


@pytest.mark.benchmark(group="eager call overhead")
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_overhead(benchmark: Any, backend: str, name: str, training: bool) -> None:
    """Sixteen tokens and one head: the kernel ends before the next call is issued, so the host is what is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = Ours(backend).available(device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    pattern = PATTERNS[name]
    if isinstance(pattern, BlockMask):
        pattern = pattern.to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = [torch.randn(1, 16, 1, 64, device=device, dtype=dtype, requires_grad=training) for _ in range(3)]
    benchmark.pedantic(
        longgen_attn_func, (*qkv, pattern), {"backend": backend}, rounds=20, iterations=20, warmup_rounds=2
    )
