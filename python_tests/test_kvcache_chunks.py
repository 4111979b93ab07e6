"""Chunks of a prompt that the CUDA backend appends first and then attends with to all keys, in one pass.

Without a GPU the forward kernel is stood in for by the reference on the same problem, its pages gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cache_model import BF16, FP32, HALF, PATTERNS, A, Everything, assert_close, new_tokens, poisoned
from torch import Tensor

from longgen_kernels import (
    AttentionPattern,
    PagedKVCache,
    PagePool,
    SparseKVCache,
    explain_kvcache_attention,
    longgen_attn_func,
    longgen_attn_with_kvcache,
)
from longgen_kernels.cache_layout import CacheLayout
from longgen_kernels.kernels import reference
from longgen_kernels.kernels.cache_problem import CacheProblem, CacheTensors, NewTokens, as_attention
from longgen_kernels.kernels.cuda import decode
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.ops import kvcache as kvcache_ops

CAUSAL = A.causal()
# device, dtype, head_dim
KERNELS = [
    pytest.param(("cpu", FP32, 16), id="stand-in"),
    pytest.param(("cuda", BF16, 128), id="bf16-128", marks=pytest.mark.gpu),
    pytest.param(("cuda", HALF, 64), id="fp16-64", marks=pytest.mark.gpu),
]
kernels = pytest.mark.parametrize("kernel", KERNELS)
Kernel = tuple[str, torch.dtype, int]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[AttentionProblem]:
    """What the forward kernel was given in one pass over a cache, so far; on the CPU something else runs it."""
    seen: list[AttentionProblem] = []
    forward, append, choose = decode.attn_fwd, decode.cache_append, kvcache_ops._choose

    def attn_fwd(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        seen.append(problem)
        return forward(problem) if problem.q.is_cuda else reference.attn_fwd(problem.gathered())

    def cache_append(cache: CacheTensors, new: NewTokens) -> None:
        (append if cache.k.is_cuda else reference.cache_append)(cache, new)

    def choose_as_on_hopper(problem: CacheProblem, requested: str) -> str:
        fits = problem.n > 16 and problem.cache.layout.keeps_everything
        if fits and requested == "auto" and not problem.q.is_cuda:
            return "cuda"
        return choose(problem, requested)

    monkeypatch.setattr(decode, "attn_fwd", attn_fwd)
    monkeypatch.setattr(decode, "cache_append", cache_append)
    monkeypatch.setattr(kvcache_ops, "_choose", choose_as_on_hopper)
    return seen


def backend_of(kernel: Kernel) -> str:
    return "cuda" if kernel[0] == "cuda" else "auto"


def model_of(kernel: Kernel, pattern: AttentionPattern = CAUSAL, batch: int = 3, kv_heads: int = 2) -> Everything:
    device, dtype, head_dim = kernel
    return Everything(pattern, batch, kv_heads, head_dim, dtype, device)


def sparse_cache(model: Everything, poison: Any, max_seqlen: int = 700, **options: Any) -> SparseKVCache:
    sizes = (model.batch, model.kv_heads, model.head_dim, max_seqlen)
    return poisoned(SparseKVCache(CAUSAL, *sizes, dtype=model.dtype, device=model.device, **options), poison)


def paged_cache(model: Everything, poison: Any, page_size: int) -> PagedKVCache:
    pages = model.batch * (700 // page_size + 2)
    pool = PagePool(pages, page_size, model.kv_heads, model.head_dim, dtype=model.dtype, device=model.device)
    pool.give_back(pool.take(7)[::-1])  # pages in another order than a sequence's tokens
    return PagedKVCache(CAUSAL, poisoned(pool, poison), model.batch, 700)


def ints(x: list[int] | None, model: Everything) -> Tensor | None:
    return None if x is None else torch.tensor(x, dtype=torch.int32, device=model.device)


def step(
    model: Everything, cache: Any, n: int, backend: str, counts: list[int] | None = None, group: int = 2
) -> tuple[Tensor, Tensor]:
    q, k, v = new_tokens(model, n, group * model.kv_heads)
    starts = model.lengths
    model.append(k, v, counts)
    got = longgen_attn_with_kvcache(q, cache, k, v, counts=ints(counts, model), return_lse=True, backend=backend)
    assert_close(got, model.attend(q, starts), counts)
    assert cache.seqlens.tolist() == model.lengths
    return got


# Chunks of new tokens, and of how many of them are each sequence's. Ends of tiles and pages, and no tokens at all.
CHUNKS: dict[str, list[tuple[int, list[int] | None]]] = {
    "even": [(40, None), (17, None), (1, None), (128, None), (130, None), (16, None), (33, None)],
    "up to ends of pages": [(16, None), (17, [16, 17, 0]), (112, [96, 95, 112]), (128, None), (128, [127, 128, 1])],
    "a sequence stays empty": [(20, [20, 0, 3]), (64, [0, 0, 64]), (50, [50, 0, 50]), (18, None)],
    "nobody has tokens": [(20, None), (20, [0, 0, 0]), (20, [5, 20, 0]), (1, None)],
}
chunks = pytest.mark.parametrize("name", CHUNKS)


@kernels
@chunks
@pytest.mark.parametrize("page_size", [None, 16, 64, 256], ids=["one piece", "16", "64", "256"])
def test_chunks(name: str, page_size: int | None, kernel: Kernel, passes: list[Any], poison: Any) -> None:
    model = model_of(kernel)
    cache = sparse_cache(model, poison) if page_size is None else paged_cache(model, poison, page_size)
    for n, counts in CHUNKS[name]:
        step(model, cache, n, backend_of(kernel), counts)
    # The first chunk finds no keys in the cache: it is attention as such.
    assert len(passes) == sum(n > 16 for n, _ in CHUNKS[name][1:])


@kernels
def test_slots_that_are_no_multiple_of_a_tile_and_a_cache_that_grows(
    kernel: Kernel, passes: list[Any], poison: Any
) -> None:
    model = model_of(kernel)
    cache = sparse_cache(model, poison, max_seqlen=50, grows=True)
    for n in (33, 17, 33, 60, 90):
        step(model, cache, n, backend_of(kernel))
    assert [problem.k.shape[1] for problem in passes] == [64, 112, 208, 400]


@kernels
@pytest.mark.parametrize("group", [1, 4, 20])
def test_a_prompt_in_random_chunks_is_one_prompt(group: int, kernel: Kernel, passes: list[Any], poison: Any) -> None:
    model, total = model_of(kernel, batch=1), 600
    ends = sorted({0, total, *torch.randint(17, total - 17, (6,)).tolist()})
    q, k, v = new_tokens(model, total, group * model.kv_heads)
    cache = sparse_cache(model, poison)
    # Up to 16 tokens are another kernel's, which has a limit of heads a KV head.
    parts = [longgen_attn_with_kvcache(q[:, a:b], cache, k[:, a:b], v[:, a:b], return_lse=True,
                                       backend=backend_of(kernel) if b - a > 16 else "auto")
             for a, b in pairwise(ends)]  # fmt: skip
    got = torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    assert_close(got, longgen_attn_func(q.float(), k.float(), v.float(), CAUSAL, return_lse=True, backend="reference"))
    if kernel[0] == "cuda":
        assert_close(got, tuple(x.float() for x in longgen_attn_func(q, k, v, CAUSAL, return_lse=True, backend="cuda")))
    assert len(passes) == sum(b - a > 16 for a, b in pairwise(ends[1:]))


@kernels
def test_queries_of_tokens_that_are_in_the_cache_already(kernel: Kernel, passes: list[Any], poison: Any) -> None:
    model = model_of(kernel)
    cache = sparse_cache(model, poison)
    _, k, v = new_tokens(model, 200, 1)
    lengths = [200, 0, 30]  # the second and the third have fewer tokens than there are queries
    model.append(k, v, lengths)
    cache.append(k, v, ints(lengths, model), backend=backend_of(kernel))
    for n in (17, 150):
        q = new_tokens(model, n, 4)[0]
        got = longgen_attn_with_kvcache(q, cache, return_lse=True, backend=backend_of(kernel))
        assert_close(got, model.attend(q, [length - n for length in model.lengths]))
    assert len(passes) == 2


@kernels
@pytest.mark.parametrize("slots", [160, 150])  # 150: no multiple of anything
@pytest.mark.parametrize("page_size", [None, 16, 32], ids=["one piece", "16", "32"])
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_plain_tensors(
    kind: str, page_size: int | None, slots: int, kernel: Kernel, passes: list[Any], poison: Any
) -> None:
    """Slots are positions there, whatever is visible. What is past the end of the memory is dropped."""
    lengths, n = [0, 1, 15, 16, 63, 100, slots - 20, slots - 3, slots], 20
    model = model_of(kernel, PATTERNS[kind], batch=len(lengths))
    _, k, v = new_tokens(model, slots, 1)
    model.append(k, v, lengths)
    memory = (torch.full((len(lengths), 160, *k.shape[2:]), float("nan"), dtype=k.dtype, device=k.device)
              for _ in range(2))  # fmt: skip
    caches = [x[:, :slots] if page_size is None else x for x in memory]  # strides of 160 tokens
    for x, own in ((caches[0], model.k), (caches[1], model.v)):
        for b, length in enumerate(lengths):
            x[b, :length] = own[b]
    options: dict[str, Any] = {"pattern": PATTERNS[kind], "return_lse": True, "backend": backend_of(kernel)}
    if page_size is not None:
        slots = 160
        names = torch.randperm(len(lengths) * slots // page_size)
        table = names.view(len(lengths), -1).to(k.device, torch.int32)
        for i, x in enumerate(caches):
            caches[i] = torch.empty_like(x).view(-1, page_size, *x.shape[2:])
            caches[i][names.to(k.device)] = x.reshape(-1, page_size, *x.shape[2:])
        options["block_table"] = table
    options["cache_seqlens"] = ints(lengths, model)
    q, new_k, new_v = new_tokens(model, n, 4)
    got = longgen_attn_with_kvcache(q, tuple(caches), new_k, new_v, **options)
    kept = [min(n, slots - length) for length in lengths]
    model.append(new_k, new_v, kept)
    assert_close(got, model.attend(q, lengths))
    assert options["cache_seqlens"].tolist() == lengths
    options["cache_seqlens"] = ints(model.lengths, model)
    got = longgen_attn_with_kvcache(q, tuple(caches), **options)
    assert_close(got, model.attend(q, [length - n for length in model.lengths]))
    assert len(passes) == 2


def test_lengths_of_the_moment_and_no_copy_of_a_key() -> None:
    model = model_of(("cpu", FP32, 16))
    cache = sparse_cache(model, torch.Tensor.zero_)
    cache.seqlens.copy_(torch.tensor([0, 30, 690]))
    q, k, v = new_tokens(model, 20, 4)
    new = NewTokens(k, v, torch.tensor([20, 3, 20], dtype=torch.int32))
    attention = as_attention(CacheProblem(q, cache.tensors, 0.25, 0, new))
    cache.seqlens.zero_()
    assert attention.q_starts.tolist() == [0, 30, 690]
    assert attention.cu_seqlens_q.tolist() == [0, 20, 40, 60]
    assert attention.cu_seqlens_k.tolist() == [0, 20, 53, 53 + 704]  # the slots, not 710
    assert attention.block_table.tolist() == [[0], [1], [2]]
    assert (attention.k.data_ptr(), attention.v.data_ptr()) == (cache.k.data_ptr(), cache.v.data_ptr())
    assert attention.k.shape == (3, 704, 2, 16)
    assert {x.dtype for x in (attention.q_starts, attention.cu_seqlens_k, attention.block_table)} == {torch.int32}


# -- who takes it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "backend"), [("sink and window", "auto"), ("causal", "reference")])
def test_others_attend_to_the_chunk_and_the_cache_apart(
    kind: str, backend: str, passes: list[Any], poison: Any
) -> None:
    model = model_of(("cpu", FP32, 16), PATTERNS[kind])
    cache = poisoned(SparseKVCache(PATTERNS[kind], 3, 2, 16, 700, dtype=FP32), poison)
    for n in (40, 40):
        step(model, cache, n, backend)
    assert not passes


def tensors(pattern: AttentionPattern = CAUSAL, ring: int | None = None, slots: int = 704, **options: Any) -> Any:
    k = torch.zeros(2, 2, 1, 64, dtype=HALF).expand(-1, -1, slots, -1)
    lengths = torch.zeros(2, dtype=torch.int32)
    return CacheTensors(k, k, lengths, CacheLayout(pattern, ring), **options)


SCALES = torch.ones(2)
PAIR = tensors()
SUPPORT: list[tuple[str, str | None, Callable[[], Any]]] = [
    ("a pair of tensors", None, lambda: PAIR),
    ("a pair under a sparse pattern", None, lambda: tensors(A.sink_window(4, 30))),
    ("a dense cache", None, lambda: tensors(ring=0)),
    ("a sparse cache", "up to 16 query tokens of a cache that drops tokens, got 20",
     lambda: tensors(A.sink_window(4, 30), ring=48)),
    ("a sink alone", "a cache that drops tokens", lambda: tensors(A.sink_window(4, 0), ring=0)),
    ("fp8", "up to 16 query tokens of an fp8 cache, got 20", lambda: tensors(k_scale=SCALES, v_scale=SCALES)),
    ("hardly any slots", "2 sequences of 8 slots, got 20", lambda: tensors(slots=8)),
    ("more keys than are counted", "2 sequences of 1073741824 slots", lambda: tensors(slots=1 << 30)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "reason", "cache"), SUPPORT, ids=[name for name, _, _ in SUPPORT])
def test_support(name: str, reason: str | None, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it does not depend on the GPU."""
    for question in ("cache_unsupported", "attention_unsupported"):
        monkeypatch.setattr(decode, question, lambda _: None)
    got = decode.cache_attention_unsupported(CacheProblem(torch.zeros(2, 20, 4, 64, dtype=HALF), cache(), 0.25))
    assert (got is None) == (reason is None)
    assert reason is None or reason in got


def test_what_the_forward_kernel_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(problem: AttentionProblem) -> str:
        asked.append(problem)
        return "no luck"

    monkeypatch.setattr(decode, "cache_unsupported", lambda _: None)
    monkeypatch.setattr(decode, "attention_unsupported", refuse)
    q, table = torch.zeros(2, 20, 4, 64, dtype=HALF), torch.zeros(2, 3, dtype=torch.int32)
    for cache in (PAIR, PAIR._replace(block_table=table)):
        assert decode.cache_attention_unsupported(CacheProblem(q, cache, 0.25)) == "no luck"
        assert asked[-1].block_table is cache.block_table
        assert asked[-1].k.shape == (2, 704, 2, 64)


@pytest.mark.parametrize(
    ("batch", "n", "heads", "idle"),
    [(1, 16, 32, False), (1, 17, 32, True), (1, 255, 32, True), (1, 384, 32, False), (4, 128, 32, False),
     (1, 1024, 8, True), (1, 1152, 8, False)],
)  # fmt: skip
def test_short_chunks_leave_most_of_a_gpu_idle(
    batch: int, n: int, heads: int, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 132 multiprocessors: "auto" asks those first who split a sequence's keys."""
    monkeypatch.setattr(decode, "multiprocessors", lambda _: 132)
    k, lengths = torch.empty(batch, heads, 64, 64, device="meta"), torch.empty(batch, device="meta")
    cache = CacheTensors(k, k, lengths, CacheLayout(CAUSAL))
    assert decode.leaves_gpu_idle(CacheProblem(torch.empty(batch, n, heads, 64, device="meta"), cache, 0.25)) == idle


def test_an_explanation_of_a_chunk() -> None:
    cache = SparseKVCache(CAUSAL, 1, 2, 16, 100, dtype=FP32)
    reasons = explain_kvcache_attention(torch.empty(1, 40, 4, 16), cache)
    assert reasons["reference"] is None
    assert reasons["cuda"] == "takes CUDA tensors, got cpu tensors"


def test_while_something_traces_the_chunk_and_the_cache_are_apart(passes: list[Any], poison: Any) -> None:
    """Which backend will run is known inside the operators only; and the graph is one."""
    model = model_of(("cpu", FP32, 16))
    cache = sparse_cache(model, poison)
    step(model, cache, 40, "auto")
    q, k, v = new_tokens(model, 40, 4)
    compiled = torch.compile(longgen_attn_with_kvcache, fullgraph=True, backend="eager")
    starts = model.lengths
    model.append(k, v)
    assert_close(compiled(q, cache, k, v, return_lse=True), model.attend(q, starts))
    assert [problem.cu_seqlens_k.diff().tolist() for problem in passes] == [[40, 40, 40]]  # without the chunk


@kernels
def test_operators(kernel: Kernel, passes: list[Any]) -> None:
    model = model_of(kernel, batch=2)
    cache = sparse_cache(model, torch.Tensor.zero_)
    q, k, v = new_tokens(model, 20, 4)
    cache.append(k, v, backend="auto")
    written = (cache.k, cache.v, cache.seqlens, cache.tickets, None, CAUSAL.encode(), cache.layout.ring)
    ops, backend = torch.ops.longgen_kernels, backend_of(kernel)
    torch.library.opcheck(ops.kvcache_attn, (q, *written, 0.25, -20, backend))
    torch.library.opcheck(ops.kvcache_append_attn, (q, *written, k, v, None, True, 0.25, backend))
    assert passes


# -- on a GPU ---------------------------------------------------------------------------------------------------------

GPU = KERNELS[1].values[0]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 64], ids=["one piece", "64"])
def test_a_cuda_graph_of_a_chunk_replays_while_the_cache_grows(page_size: int | None, poison: Any) -> None:
    model = model_of(GPU)
    cache = sparse_cache(model, poison) if page_size is None else paged_cache(model, poison, page_size)
    for n in (30, 20):
        step(model, cache, n, "cuda")
    q, k, v = new_tokens(model, 40, 4)
    counts = torch.tensor([40, 0, 7], dtype=torch.int32, device=model.device)
    cache.reserve(640)  # of pages
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = longgen_attn_with_kvcache(q, cache, k, v, counts=counts, return_lse=True, backend="cuda")
    for i in range(6):
        for x, fresh in zip((q, k, v), new_tokens(model, 40, 4), strict=True):
            x.copy_(fresh)
        each = [40 - i, 7 * i, 40]
        counts.copy_(torch.tensor(each))
        graph.replay()
        starts = model.lengths
        model.append(k, v, each)
        assert_close(got, model.attend(q, starts), each)
    assert cache.seqlens.tolist() == model.lengths


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    model = model_of(GPU)
    cache = sparse_cache(model, torch.Tensor.zero_)
    q, k, v = new_tokens(model, 100, 4)
    cache.append(k, v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        longgen_attn_with_kvcache(q, cache, k, v, backend="cuda")
        longgen_attn_with_kvcache(q, cache, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 16, 128], ids=["one piece", "16", "128"])
def test_a_long_chunk_is_taken_unasked(page_size: int | None, passes: list[Any], poison: Any) -> None:
    """Real sizes: many tiles of queries and keys, heads of projections' strides, and the choice left to the package."""
    model = model_of(GPU, batch=2, kv_heads=8)
    if page_size is None:
        cache = sparse_cache(model, poison, max_seqlen=5001)
    else:
        pool = PagePool(2 * (5001 // page_size + 1), page_size, 8, 128, dtype=BF16, device="cuda")
        cache = PagedKVCache(CAUSAL, poisoned(pool, poison), 2, 5001)
    for n, counts in ((2000, [2000, 5]), (1500, None), (1501, [1501, 0])):
        step(model, cache, n, "auto", counts, group=4)
    assert len(passes) == 2
