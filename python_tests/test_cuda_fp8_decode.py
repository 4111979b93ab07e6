"""The CUDA decode kernel on fp8 caches: every way through it, and the bytes that it appends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_model import BF16, HALF, PATTERNS, assert_close, new_tokens, poisoned
from test_cuda_decode import WAYS, take
from test_fp8_cache import SCALES, Quantising, append, odd_values, step
from test_kv_cache import settings_of
from torch import Tensor

from longgen_kernels import PagedKVCache, PagePool, SparseKVCache, explain_kvcache_attention, longgen_attn_with_kvcache
from longgen_kernels.cache_scales import FP8, as_bytes
from longgen_kernels.kernels.cuda import decode

pytestmark = pytest.mark.gpu
ways = pytest.mark.parametrize("way", [way for way, (bulk, _) in WAYS.items() if bulk])
head_dims = pytest.mark.parametrize("head_dim", [64, 128])
dtypes = pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)


def model_and_cache(
    kind: str, poison: Any, *, head_dim: int = 128, dtype: torch.dtype = BF16, batch: int = 2
) -> tuple[Quantising, SparseKVCache]:
    device = settings_of("cuda")["device"]
    model = Quantising(PATTERNS[kind], batch, 2, head_dim, dtype, device)
    cache = SparseKVCache(
        PATTERNS[kind], batch, 2, head_dim, 400, dtype=dtype, cache_dtype=FP8, k_scale=SCALES[0], v_scale=SCALES[1],
        device=device,
    )  # fmt: skip
    return model, poisoned(cache, poison)


@ways
@head_dims
@dtypes
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_every_way(
    way: str, kind: str, head_dim: int, dtype: torch.dtype, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [0, 1, 15, 16, 17, 63, 129, 370]
    model, cache = model_and_cache(kind, poison, head_dim=head_dim, dtype=dtype, batch=len(lengths))
    take(way, monkeypatch)
    append(model, cache, max(lengths), "cuda", lengths)
    for n in (1, 1, 2, 9, 16):
        step(model, cache, n, "cuda")
    assert cache.seqlens.tolist() == model.lengths


@ways
@head_dims
@pytest.mark.parametrize("group", [1, 4, 13])
def test_groups(way: str, head_dim: int, group: int, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = model_and_cache("sink and window", poison, head_dim=head_dim)
    take(way, monkeypatch)
    append(model, cache, 90, "cuda", [90, 7])
    for n in (1, 3):
        q, k, v = new_tokens(model, n, group * model.kv_heads)
        starts = model.lengths
        model.append(k, v)
        assert_close(
            longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend="cuda"), model.attend(q, starts)
        )


@ways
@head_dims
@dtypes
@pytest.mark.parametrize("n", [1, 16])
def test_a_step_writes_and_sees_what_is_read_later(
    way: str, n: int, head_dim: int, dtype: torch.dtype, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step quantises on its way gives what the cache's bytes do, which `append` would have written.

    To rounding: where it has new tokens, the last pair of chunks is another warp's.
    """
    model, cache = model_and_cache("causal", poison, head_dim=head_dim, dtype=dtype)
    other = SparseKVCache.from_state_dict(cache.state_dict())
    take(way, monkeypatch)
    k, v = new_tokens(model, 50, 1)[1:]
    for c in (cache, other):
        c.append(k, v, backend="cuda")
    q, k, v = new_tokens(model, n, 4)
    k, v = (100 * x for x in (k, v))  # some saturate
    step_result = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend="cuda")
    other.append(k, v, backend="cuda")
    for a, b in ((cache.k, other.k), (cache.v, other.v)):
        assert torch.equal(as_bytes(a)[:, :, : 50 + n], as_bytes(b)[:, :, : 50 + n])
    later = longgen_attn_with_kvcache(q, other, return_lse=True, backend="cuda")
    for a, b in zip(step_result, later, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=16 * eps, atol=28 * eps)  # values are up to 7


@head_dims
@dtypes
@pytest.mark.parametrize("in_step", [False, True])
def test_bytes_are_those_of_the_reference(head_dim: int, dtype: torch.dtype, in_step: bool, poison: Any) -> None:
    x = odd_values(dtype).to(settings_of("cuda")["device"])
    tokens = min(16, x.numel() // (2 * head_dim))
    k = x[: tokens * 2 * head_dim].unflatten(0, (1, tokens, 2, head_dim))
    written: list[list[Tensor]] = []
    for backend in ("reference", "cuda"):
        cache = model_and_cache("causal", poison, head_dim=head_dim, dtype=dtype, batch=1)[1]
        if in_step:
            longgen_attn_with_kvcache(k, cache, k, -k, backend=backend)
        else:
            cache.append(k, -k, backend=backend)
        written.append([y[:, :, :tokens].float() for y in (cache.k, cache.v)])
    for a, b in zip(*written, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@ways
def test_pages(way: str, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, sizes = PATTERNS["strided blocks with per-head phases"], settings_of("cuda")
    pool = PagePool(60, 16, 2, **sizes, cache_dtype=FP8, k_scale=SCALES[0], v_scale=SCALES[1])
    cache = PagedKVCache(pattern, poisoned(pool, poison), 2, 400)
    model = Quantising(pattern, 2, 2, **sizes)
    take(way, monkeypatch)
    append(model, cache, 70, "cuda")
    for n in (16, 1, 5):
        step(model, cache, n, "cuda")


@ways
@pytest.mark.parametrize("n", [1, 3])
def test_steps_of_one_cache_in_a_graph(way: str, n: int, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = model_and_cache("strided blocks with per-head phases", poison)
    take(way, monkeypatch)
    append(model, cache, 60, "cuda", [60, 9])
    inputs = [new_tokens(model, n, 4) for _ in range(12)]
    before = cache.seqlens.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        longgen_attn_with_kvcache(inputs[0][0], cache, backend="cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend="cuda") for q, k, v in inputs]
    cache.seqlens.copy_(before)
    graph.replay()
    for (q, k, v), result in zip(inputs, got, strict=True):
        starts = model.lengths
        model.append(k, v)
        assert_close(result, model.attend(q, starts))


def test_what_the_kernel_refuses(poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model_and_cache("causal", poison)[1]
    monkeypatch.setattr(decode, "_runs_hopper_code", lambda _: False)
    q = torch.empty(2, 1, 4, 128, dtype=BF16, device=cache.k.device)
    assert explain_kvcache_attention(q, cache)["cuda"] == "attends to fp8 caches on Hopper (90a) only"
