"""Attention to keys in pages, against the same keys packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import INTERPRETED, NAN, A, cumulated
from torch import Tensor

from longgen_kernels import BlockMask, longgen_attn_varlen_func

SEQLENS_Q = (5, 0, 70, 33)
SEQLENS_K = (5, 40, 130, 0)
PATTERNS = {
    "causal": A.causal(),
    "bidirectional": A.bidirectional(),
    "sink and window": A.sink_window(5, 40),
    "strided blocks": A.strided(3, 16, window=20, head_phase_step=1),
    "block mask": BlockMask.from_dense(torch.ones(2, 3, 3, dtype=torch.bool).tril(), 64),
}


def paged(x: Tensor, seqlens: tuple[int, ...], page_size: int, pages: Tensor) -> Tensor:
    """The rows of packed `x` in the pages that the block table `pages` names; NaN everywhere else."""
    pool = torch.full((int(pages.max()) + 2, page_size, *x.shape[1:]), NAN, dtype=x.dtype, device=x.device)
    begin = 0
    for b, length in enumerate(seqlens):
        for row in range(length):
            pool[pages[b, row // page_size], row % page_size] = x[begin + row]
        begin += length
    return pool


def block_table(page_size: int) -> Tensor:
    """Pages in no order; entries behind a sequence's keys name no page at all."""
    needed = [-(-n // page_size) for n in SEQLENS_K]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.full((len(SEQLENS_K), max(needed) + 1), -1, dtype=torch.int32)
    for b, n in enumerate(needed):
        for i in range(n):
            table[b, i] = order.pop()
    return table


def check(
    pattern: Any, page_size: int, device: str, head_dim: int, dtype: torch.dtype, backend: str, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(SEQLENS_Q), 4, head_dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(sum(SEQLENS_K), 2, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    cu_q, cu_k = cumulated(SEQLENS_Q, device), cumulated(SEQLENS_K, device)
    table = block_table(page_size).to(device)
    if isinstance(pattern, BlockMask):
        pattern = pattern.to(device)
    starts = torch.tensor([0, 3, 60, 100], dtype=torch.int32, device=device)
    for q_start in (None, starts):
        arguments = {"return_lse": True, "q_start": q_start}
        out, lse = longgen_attn_varlen_func(
            q, paged(k, SEQLENS_K, page_size, table), paged(v, SEQLENS_K, page_size, table), pattern, cu_q, cu_k,
            70, 130, backend=backend, block_table=table, **arguments,
        )  # fmt: skip
        wanted = longgen_attn_varlen_func(
            q.float(), k.float(), v.float(), pattern, cu_q, cu_k, 70, 130, backend="reference", **arguments
        )
        torch.testing.assert_close(out.float(), wanted[0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, wanted[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("name", PATTERNS)
def test_reference(name: str, page_size: int) -> None:
    check(PATTERNS[name], page_size, "cpu", 16, torch.float32, "reference", 1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ["causal", "strided blocks"])
def test_triton_interpreted(name: str) -> None:
    check(PATTERNS[name], 32, "cpu", 16, torch.float32, "triton", 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("name", PATTERNS)
def test_gpu(name: str, page_size: int, head_dim: int, poison: object) -> None:
    check(PATTERNS[name], page_size, "cuda", head_dim, torch.float16, "auto", 5e-3)


def test_sequences_may_share_pages() -> None:
    q, pool = torch.randn(8, 2, 16), torch.randn(3, 16, 2, 16)
    table = torch.tensor([[2, 0], [2, 1]], dtype=torch.int32)
    cu_q, cu_k = cumulated((4, 4), "cpu"), cumulated((20, 20), "cpu")
    out = longgen_attn_varlen_func(q, pool, pool, A.causal(), cu_q, cu_k, 4, 20, block_table=table)
    for b in range(2):
        keys = pool[table[b].long()].flatten(0, 1)[:20]
        alone = longgen_attn_varlen_func(
            q[4 * b : 4 * b + 4], keys, keys, A.causal(), cumulated((4,), "cpu"), cumulated((20,), "cpu"), 4, 20
        )
        torch.testing.assert_close(out[4 * b : 4 * b + 4], alone)


def test_bad_calls_say_what_is_wrong() -> None:
    q, pool, cu = torch.randn(8, 2, 16), torch.randn(3, 16, 2, 16), cumulated((4, 4), "cpu")
    table = torch.zeros(2, 1, dtype=torch.int32)

    def call(q: Tensor = q, k: Tensor = pool, table: Tensor = table, **kwargs: Any) -> Tensor:
        return longgen_attn_varlen_func(q, k, k, A.causal(), cu, cu, 4, 4, block_table=table, **kwargs)

    assert call().shape == q.shape
    with pytest.raises(ValueError, match="pages, page_size"):
        call(k=pool.flatten(0, 1))
    with pytest.raises(TypeError, match="int32"):
        call(table=table.long())
    with pytest.raises(ValueError, match="block_table must be"):
        call(table=table[:1])
    with pytest.raises(ValueError, match="k_start"):
        call(k_start=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="no gradient"):
        call(q=q.clone().requires_grad_())


def test_operator() -> None:
    q, pool, cu = torch.randn(8, 2, 16), torch.randn(3, 16, 2, 16), cumulated((4, 4), "cpu")
    table = torch.zeros(2, 1, dtype=torch.int32)
    arguments = (A.causal().encode(), None, None, 0.25, 0, 0, cu, cu, None, None, False, "auto")
    torch.library.opcheck(torch.ops.longgen_kernels.attn_paged_fwd.default, (q, pool, pool, table, *arguments))
