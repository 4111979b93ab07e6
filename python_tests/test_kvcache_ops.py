"""The cache's operators as torch sees them, CUDA graphs, large offsets; and what bad calls say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import random_mask
from cache_model import FP32, PATTERNS, A, Everything, assert_close, new_tokens
from test_kv_cache import model_and_cache, prefill, settings_of, step

from longgen_kernels import (
    SparseKVCache,
    explain_append,
    explain_kvcache_attention,
    longgen_attn_with_kvcache,
)
from longgen_kernels.kernels import reference, triton
from longgen_kernels.kernels.cache_problem import SEAT_COUNTS, num_splits

STRIDED = PATTERNS["strided blocks with per-head phases"]
ops = torch.ops.longgen_kernels
GPU_BACKENDS = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]
)


def operator_cache(backend: str) -> tuple[Everything, SparseKVCache, tuple[Any, ...]]:
    """A cache of 40 tokens, and its tensors as the operators take them behind `seqlens`."""
    model, cache = model_and_cache(STRIDED, backend, torch.Tensor.zero_)
    prefill(model, cache, [40, 33], backend)
    return model, cache, (cache.tickets, None, STRIDED.encode(), cache.layout.ring)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(backend: str) -> None:
    model, cache, layout = operator_cache(backend)
    q, k, v = new_tokens(model, 2, 4)
    counts = torch.tensor([2, 1], dtype=torch.int32, device=model.device)
    written = (cache.k, cache.v, cache.seqlens)
    torch.library.opcheck(ops.kvcache_attn, (q, *written, *layout, 0.25, -2, backend))
    torch.library.opcheck(ops.kvcache_append, (*written, *layout, k, v, counts, True, backend))
    torch.library.opcheck(ops.kvcache_append_attn, (q, *written, *layout, k, v, None, True, 0.25, backend))


def test_that_lengths_are_equal_reaches_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called from Python, and through each of the operators."""
    _, cache, layout = operator_cache("reference")
    q, k, v = (torch.randn(2, 1, heads, 16) for heads in (4, 2, 2))
    seen = []
    attend = reference.cache_attn
    monkeypatch.setattr(reference, "cache_attn", lambda p: (seen.append(p.cache.equal_lengths), attend(p))[1])
    written = (cache.k, cache.v, cache.seqlens)
    for equal in (False, True):
        if equal:
            cache.reset()
        longgen_attn_with_kvcache(q, cache, k, v, backend="reference")
        rest = {"equal_lengths": equal}
        ops.kvcache_attn(q, *written, *layout, 0.25, -1, "reference", **rest)
        ops.kvcache_append_attn(q, *written, *layout, k, v, None, True, 0.25, "reference", **rest)
    assert seen == [False] * 3 + [True] * 3


@pytest.mark.parametrize("backend", ["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_without_graph_breaks(backend: str) -> None:
    model, cache, layout = operator_cache(backend)

    def decode(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, seqlens: Any) -> Any:
        out, lse = ops.kvcache_append_attn(q, k_cache, v_cache, seqlens, *layout, k, v, None, True, 0.25, backend)
        return out * 2, lse

    qkv = new_tokens(model, 1, 4)
    tensors = (cache.k, cache.v, cache.seqlens)
    want_cache, got_cache = ([x.clone() for x in tensors] for _ in range(2))
    want = decode(*qkv, *want_cache)
    got = torch.compile(decode, fullgraph=True, backend="aot_eager")(*qkv, *got_cache)
    for x, y in zip((*got, *got_cache), (*want, *want_cache), strict=True):
        torch.testing.assert_close(x, y)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@GPU_BACKENDS
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_a_cuda_graph_replays_while_the_cache_grows(kind: str, backend: str, poison: Any) -> None:
    """From an empty cache through several wraps of the ring, with one graph."""
    model, cache = model_and_cache(PATTERNS[kind], backend, poison)
    q, k, v = new_tokens(model, 1, 4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        longgen_attn_with_kvcache(q, cache, k, v, backend=backend)  # compiles before the capture
    torch.cuda.current_stream().wait_stream(side)
    cache.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend=backend)
    cache.reset()
    for i in range(200):
        for x, fresh in zip((q, k, v), new_tokens(model, 1, 4), strict=True):
            x.copy_(fresh)
        graph.replay()
        cache.advanced(1)
        starts = model.lengths
        model.append(k, v)
        if i % 7 == 0:
            assert_close(got, model.attend(q, starts))
    assert cache.seqlens.tolist() == model.lengths
    step(model, cache, 1, backend)


@GPU_BACKENDS
def test_nothing_waits_for_the_device(backend: str) -> None:
    model, cache = model_and_cache(STRIDED, backend, torch.Tensor.zero_)
    q, k, v = new_tokens(model, 2, 4)
    chunk = new_tokens(model, 40, 4)
    counts = torch.tensor([1, 2], dtype=torch.int32, device="cuda")

    def run() -> None:
        cache.append(k, v, counts, backend=backend)
        longgen_attn_with_kvcache(q, cache, k, v, backend=backend)
        longgen_attn_with_kvcache(chunk[0], cache, *chunk[1:])
        cache.crop(1)
        cache.crop(counts, at_most=2)
        cache.reorder(torch.zeros(2, dtype=torch.int64, device="cuda"))

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU_BACKENDS
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
@pytest.mark.parametrize("n", [1, 4])
def test_long_caches_are_split_and_repeat_bitwise(kv_heads: int, n: int, backend: str, poison: Any) -> None:
    """Real sizes, so that many thread blocks share a sequence; every run of the same call gives the same bits."""
    for pattern in (A.sink_window(128, 2048), A.causal(), A.strided(16, 64, window=1024)):
        model, cache = model_and_cache(pattern, backend, poison, kv_heads=kv_heads, max_seqlen=9300)
        prefill(model, cache, [9216, 2100], backend)
        q, k, v = new_tokens(model, n, 4 * kv_heads)
        starts = model.lengths
        model.append(k, v)
        first = longgen_attn_with_kvcache(q, cache, k, v, return_lse=True, backend=backend)
        assert_close(first, model.attend(q, starts))
        again = longgen_attn_with_kvcache(q, cache, return_lse=True, backend=backend)
        for _ in range(50):
            other = longgen_attn_with_kvcache(q, cache, return_lse=True, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(again, other, strict=True))
        assert cache.tickets[:-SEAT_COUNTS].count_nonzero() == 0


@GPU_BACKENDS
def test_offsets_past_two_billion_elements(backend: str) -> None:
    """Tokens from 256 on, the new ones among them, lie behind 2^31 elements."""
    sizes = settings_of(backend)
    heads, dim, dtype = 2, sizes["head_dim"], sizes["dtype"]
    stride = 1 << 23  # between two tokens: 300 of them pass 2^31
    buffer = torch.full((300 * stride,), float("nan"), dtype=dtype, device="cuda")
    far = [buffer.as_strided((1, 300, heads, dim), (300 * stride, stride, dim, 1), i * heads * dim) for i in range(2)]
    near = [torch.randn(1, 300, heads, dim, device="cuda").to(dtype) for _ in range(2)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    q, k, v = (torch.randn(1, 2, h, dim, device="cuda").to(dtype) for h in (4, heads, heads))
    lengths = torch.tensor([280], dtype=torch.int32, device="cuda")
    options = {"cache_seqlens": lengths, "return_lse": True, "backend": backend}
    got = longgen_attn_with_kvcache(q, tuple(far), k, v, **options)
    want = longgen_attn_with_kvcache(q, tuple(near), k, v, **options)
    for x, y in zip((*got, *far), (*want, *near), strict=True):
        assert torch.equal(x, y)


# -- bad calls --------------------------------------------------------------------------------------------------------

SIZES = {"batch": 2, "kv_heads": 2, "head_dim": 16, "max_seqlen": 100, "dtype": FP32}
CACHE = SparseKVCache(A.sink_window(4, 20), **SIZES)
Q, K, V = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
PAIR = torch.randn(2, 50, 2, 16), torch.randn(2, 50, 2, 16)
LENGTHS = torch.tensor([10, 20], dtype=torch.int32)
TABLE = torch.zeros(2, 4, dtype=torch.int32)


def attend(q: Any = Q, cache: Any = CACHE, k: Any = K, v: Any = V, **options: Any) -> Any:
    return longgen_attn_with_kvcache(q, cache, k, v, **options)


def pair(cache: Any = PAIR, k: Any = None, v: Any = None, lengths: Any = LENGTHS, **options: Any) -> Any:
    return longgen_attn_with_kvcache(Q, cache, k, v, cache_seqlens=lengths, **options)


def make(pattern: Any = None, **sizes: Any) -> Any:
    return SparseKVCache(A.causal() if pattern is None else pattern, **{**SIZES, **sizes})


BAD_CALLS: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "q must be a torch.Tensor, got list", lambda: attend(q=[1])),
    (ValueError, r"q must be \(batch, n, q_heads, head_dim\), got shape \(3, 4, 16\)", lambda: attend(q=Q[0])),
    (TypeError, "q must have the cache's dtype torch.float32, got torch.float16", lambda: attend(q=Q.half())),
    (ValueError, "q must be on the cache's device cpu, got meta", lambda: attend(q=Q.to("meta"))),
    (ValueError, "with batch 2 and head_dim 16, got shape", lambda: attend(q=Q[:1])),
    (ValueError, "with batch 2 and head_dim 16, got shape", lambda: attend(q=Q[..., :8])),
    (ValueError, r"q heads \(3\) must be a multiple of the cache's kv heads \(2\)", lambda: attend(q=Q[:, :, :3])),
    (ValueError, "q must have stride 1 in head_dim", lambda: attend(q=Q.mT.contiguous().mT)),
    (ValueError, "k and v must be given together", lambda: attend(v=None)),
    (ValueError, "and counts only with them", lambda: attend(k=None, v=None, counts=LENGTHS)),
    (ValueError, "q and k must have one number of tokens, got 2 and 3", lambda: attend(q=Q[:, :2])),
    (TypeError, "k must have the cache's dtype torch.float32, got torch.float16", lambda: attend(k=K.half())),
    (ValueError, r"v must be \(batch, n, kv_heads, head_dim\) = \(2, 3, 2, 16\), got", lambda: attend(v=V[:, :2])),
    (ValueError, r"k must be \(batch, n, kv_heads, head_dim\) = \(2, 3, 2, 16\), got", lambda: attend(k=K[:, :, :1])),
    (TypeError, "counts must be an int32 tensor, got torch.int64", lambda: attend(counts=LENGTHS.long())),
    (ValueError, r"counts must be of shape \(2\), got \(1,\)", lambda: attend(counts=LENGTHS[:1])),
    (ValueError, "softmax_scale must be positive and finite, got 0", lambda: attend(softmax_scale=0)),
    (ValueError, "backend is 'fast'; valid are", lambda: attend(backend="fast")),
    (NotImplementedError, "cuda: takes CUDA tensors, got cpu tensors", lambda: attend(backend="cuda")),
    (ValueError, "are the SparseKVCache's own: leave out", lambda: attend(cache_seqlens=LENGTHS)),
    (TypeError, r"cache must be a KV cache or a pair of tensors \(k, v\), got list", lambda: pair(cache=[*PAIR])),
    (ValueError, "cache_seqlens must be given", lambda: pair(lengths=None)),
    (TypeError, "cache_seqlens must be an int32 tensor, got torch.int64", lambda: pair(lengths=LENGTHS.long())),
    (ValueError, "cache_seqlens must have one entry a sequence, 2, got 1", lambda: pair(lengths=LENGTHS[:1])),
    (TypeError, "k_cache must be a tensor .*, got shape", lambda: pair(cache=(PAIR[0][0], PAIR[1]))),
    (ValueError, "k_cache and v_cache must have one shape", lambda: pair(cache=(PAIR[0][:, :9], PAIR[1]))),
    (TypeError, "k_cache and v_cache must have one floating-point dtype",
     lambda: pair(cache=(PAIR[0], PAIR[1].half()))),
    (ValueError, "k_cache must have stride 1 in head_dim",
     lambda: pair(cache=tuple(x.mT.contiguous().mT for x in PAIR))),
    (TypeError, "block_table must be an int32 tensor, got torch.int64", lambda: pair(block_table=TABLE.long())),
    (ValueError, r"block_table must be of shape \(2, any\), got \(1, 4\)", lambda: pair(block_table=TABLE[:1])),
    (NotImplementedError, "takes causal AttentionPatterns", lambda: pair(pattern=A.bidirectional())),
    (NotImplementedError, "takes causal AttentionPatterns", lambda: pair(pattern=random_mask(4, 4, 16))),
    (TypeError, "pattern must be an AttentionPattern, got str", lambda: make("causal")),
    (ValueError, r"batch must be in \[1, 1073741824\], got 0", lambda: make(batch=0)),
    (TypeError, "max_seqlen must be an int, got float 10.0", lambda: make(max_seqlen=10.0)),
    (TypeError, "dtype must be float16, bfloat16, float32 or float64, got", lambda: make(dtype=torch.int32)),
    (ValueError, "101 more tokens than 0 would pass max_seqlen=100", lambda: make().reserve(101)),
    (TypeError, "tokens must be an int or an int32 tensor, got float", lambda: CACHE.crop(1.0)),
    (ValueError, r"tokens must be in \[0, 0\]", lambda: make().crop(1)),
    (ValueError, r"tokens must be an int, or int32 \(2,\) together with at_most", lambda: make().crop(LENGTHS)),
    (TypeError, "indices must be an int64 tensor", lambda: CACHE.reorder([1, 0])),
    (ValueError, r"indices must be \(2,\), got \(1,\)", lambda: CACHE.reorder(torch.tensor([0]))),
]  # fmt: skip


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any backend that is asked to compute fails the test."""

    def launched(*_: object) -> None:
        raise AssertionError("a kernel was launched")

    for backend in (reference, triton):
        monkeypatch.setattr(backend, "cache_attn", launched)
        monkeypatch.setattr(backend, "cache_append", launched)


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS, ids=[message for _, message, _ in BAD_CALLS])
def test_a_bad_call_says_what_is_wrong_before_anything_runs(
    error: type[Exception], message: str, call: Callable[[], object], no_launch: None
) -> None:
    with pytest.raises(error, match=message):
        call()
    assert CACHE.seqlens.tolist() == [0, 0]


def test_the_table_of_bad_calls_starts_from_good_ones() -> None:
    assert longgen_attn_with_kvcache(Q, make(), K, V).shape == Q.shape
    assert pair().shape == Q.shape
    assert pair(tuple(torch.randn(4, 16, 2, 16) for _ in range(2)), block_table=TABLE).shape == Q.shape


def test_an_explanation_names_every_backend_and_runs_nothing(no_launch: None) -> None:
    for reasons in (explain_kvcache_attention(Q, CACHE), explain_append(CACHE)):
        assert list(reasons) == ["cuda", "triton", "reference"]
        assert reasons["reference"] is None
        assert reasons["cuda"]


def test_no_tokens_at_all() -> None:
    for backend in ("reference", "triton"):
        cache = make(**settings_of(backend))
        sizes = (2, 0, 2, cache.k.shape[-1])
        empty = torch.empty(sizes, dtype=cache.k.dtype, device=cache.k.device)
        out, lse = longgen_attn_with_kvcache(empty, cache, empty, empty, return_lse=True, backend=backend)
        assert out.shape == sizes
        assert lse.shape == (2, 2, 0)
        assert cache.seqlens.tolist() == [0, 0]


@pytest.mark.parametrize("blocks", [1, 2, 8, 31, 32, 33, 100, 255, 256, 300, 1000])
@pytest.mark.parametrize("tiles", [1, 2, 35, 145, 2048])
def test_splits_fill_a_gpu(blocks: int, tiles: int) -> None:
    slots = 264
    splits = num_splits(blocks, tiles, slots)
    assert 1 <= splits <= min(128, tiles)
    if tiles > 2 and blocks * min(128, tiles) >= slots:
        waves = blocks * splits / slots
        assert waves / -(-blocks * splits // slots) > 0.7
