"""Caches that keep keys and values as fp8, against a model that quantises each token and against caches that do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import INTERPRETED
from cache_model import BF16, FP32, HALF, PATTERNS, A, Everything, assert_close, new_tokens, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_cache import MAX_SEQLEN, PHASES, backends, lengths_around_boundaries, settings_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longgen_kernels import PagedKVCache, PagePool, SparseKVCache, explain_append, longgen_attn_with_kvcache
from longgen_kernels.cache_scales import FP8, quantised

SCALES = torch.tensor([0.013, 0.25]), torch.tensor([0.02, 1 / 64])
STRIDED = PATTERNS["strided blocks with per-head phases"]
KINDS = ["causal", "sink and window", "strided blocks with per-head phases", "nothing is visible"]


@dataclass
class Quantising(Everything):
    """Keeps everything as an fp8 cache gives it back."""

    scales: tuple[Tensor, Tensor] = field(default=SCALES)

    def append(self, k: Tensor, v: Tensor, counts: list[int] | None = None) -> None:
        k, v = (there_and_back(x, s.to(x.device)) for x, s in zip((k, v), self.scales, strict=True))
        super().append(k, v, counts)


def there_and_back(x: Tensor, scale: Tensor) -> Tensor:
    """fp32 (..., heads, head_dim), rounded to the nearest of e4m3's values, which are counted up here."""
    values = torch.tensor([value_of(byte) for byte in range(127)], device=x.device)
    y = (x.float() * (1 / scale)[:, None]).clamp(-448, 448)
    above = torch.searchsorted(values, y.abs().contiguous()).clamp(1, 126)
    low, high = values[above - 1], values[above]
    ties_down = (above - 1) % 2 == 0  # a byte is even where its mantissa is
    middle = (low + high) / 2
    up = (y.abs() > middle) | ((y.abs() == middle) & ~ties_down)
    nearest = torch.copysign(torch.where(up, high, low), y)
    return torch.where(y.isnan(), y, nearest) * scale[:, None]


def value_of(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    return (mantissa / 8) * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def model_and_cache(kind: str, backend: str, poison: Any, **options: Any) -> tuple[Quantising, SparseKVCache]:
    sizes = settings_of(backend)
    batch = options.pop("batch", 2)
    model = Quantising(PATTERNS[kind], batch, 2, **sizes)
    options = {"max_seqlen": MAX_SEQLEN, "dtype": sizes["dtype"], "device": sizes["device"], **options}
    k_scale, v_scale = SCALES
    cache = SparseKVCache(
        PATTERNS[kind], batch, 2, sizes["head_dim"], cache_dtype=FP8, k_scale=k_scale, v_scale=v_scale, **options
    )
    return model, poisoned(cache, poison)


def append(model: Everything, cache: Any, n: int, backend: str, counts: list[int] | None = None) -> None:
    _, k, v = new_tokens(model, n, 1)
    model.append(k, v, counts)
    on_device = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=model.device)
    cache.append(k, v, on_device, backend=backend)


def step(model: Everything, cache: Any, n: int, backend: str, counts: list[int] | None = None) -> None:
    """Appends n random tokens and attends with them."""
    q, k, v = new_tokens(model, n, 2 * model.kv_heads)
    starts = model.lengths
    model.append(k, v, counts)
    on_device = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=model.device)
    got = longgen_attn_with_kvcache(q, cache, k, v, counts=on_device, return_lse=True, backend=backend)
    assert_close(got, model.attend(q, starts), counts)


def odd_values(dtype: torch.dtype = FP32) -> Tensor:
    """Values of every size, ties, both zeros, what saturates, and NaN."""
    exact = torch.tensor([value_of(byte) for byte in range(127)])
    ties = (exact[1:] + exact[:-1]) / 2
    huge = torch.tensor([449.0, 464, 465, 6e4, torch.inf, torch.nan])
    x = torch.cat([exact, ties, huge, torch.rand(200) * 2**-5, torch.randn(200) * 100])
    return torch.cat([x, -x]).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.013, 3.7])
def test_tokens_are_rounded_to_the_nearest(scale: float) -> None:
    x, scales = odd_values()[None], torch.tensor([scale])
    got = quantised(x, scales[:, None]).float() * scales[:, None]
    want = there_and_back(x, scales)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().sum() == 2
    assert got.abs().nan_to_num().max() == 448 * scales


@backends
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_after_a_prompt_of_a_critical_length(kind: str, backend: str, poison: Any) -> None:
    lengths = lengths_around_boundaries(PATTERNS[kind])
    model, cache = model_and_cache(kind, backend, poison, batch=len(lengths))
    append(model, cache, max(lengths), backend, lengths)
    for n in (1, 3, 13):
        step(model, cache, n, backend)
    assert cache.seqlens.tolist() == model.lengths


@backends
def test_every_backend_writes_the_same_bytes(backend: str, poison: Any) -> None:
    sizes = settings_of(backend)
    x = odd_values(sizes["dtype"])
    heads = x[: x.numel() // (2 * sizes["head_dim"]) * 2 * sizes["head_dim"]].unflatten(
        0, (1, -1, 2, sizes["head_dim"])
    )
    heads = heads.to(sizes["device"])
    for scales in (SCALES, (torch.ones(2), torch.ones(2))):
        pages = []
        for name in ("reference", backend):
            cache = SparseKVCache(
                A.causal(), 1, 2, sizes["head_dim"], MAX_SEQLEN, cache_dtype=FP8, k_scale=scales[0], v_scale=scales[1],
                dtype=sizes["dtype"], device=sizes["device"],
            )  # fmt: skip
            poisoned(cache, poison).append(heads, -heads, backend=name)
            pages.append(torch.stack([cache.k, cache.v]).float())
        torch.testing.assert_close(*pages, rtol=0, atol=0, equal_nan=True)


@backends
def test_nan_stays_nan_for_those_who_see_it(backend: str, poison: Any) -> None:
    model, cache = model_and_cache("sink and window", backend, poison)
    append(model, cache, 60, backend)
    q, k, v = new_tokens(model, 2, 4)
    v[0, 0, 0, 3] = k[1, 0, 1, 5] = torch.nan
    out = longgen_attn_with_kvcache(q, cache, k, v, backend=backend)
    assert out.isnan().nonzero().unique(dim=0)[:, :3].unique(dim=0).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 2], [1, 0, 3], [1, 1, 2], [1, 1, 3],
    ]  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [HALF] if INTERPRETED else [HALF, BF16], ids=str)
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_head_dims(head_dim: int, dtype: torch.dtype, backend: str, poison: Any) -> None:
    device = settings_of(backend)["device"]
    model = Quantising(STRIDED, 2, 2, head_dim, dtype, device)
    cache = SparseKVCache(
        STRIDED, 2, 2, head_dim, MAX_SEQLEN, dtype=dtype, cache_dtype=FP8, k_scale=SCALES[0], v_scale=SCALES[1],
        device=device,
    )  # fmt: skip
    poisoned(cache, poison)
    if backend == "cuda" and head_dim not in (64, 128):
        assert explain_append(cache)["cuda"] == f"takes head_dim 64 and 128 for fp8 caches, got {head_dim}"
        return
    append(model, cache, 130, backend, [130, 31])
    for n in (1, 9, 16):
        step(model, cache, n, backend)


@backends
def test_pages(backend: str, poison: Any) -> None:
    sizes = settings_of(backend)
    pool = PagePool(60, 16, 2, **sizes, cache_dtype=FP8, k_scale=SCALES[0], v_scale=SCALES[1])
    cache = PagedKVCache(STRIDED, poisoned(pool, poison), 2, MAX_SEQLEN)
    model = Quantising(STRIDED, 2, 2, **sizes)
    append(model, cache, 70, backend)
    for n in (16, 1, 5):
        step(model, cache, n, backend)


OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 16)),
    st.tuples(st.just("ragged"), st.lists(st.integers(0, 16), min_size=3, max_size=3)),
    st.tuples(st.just("append"), st.integers(1, 70)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    st.tuples(st.just("reset"), st.just(0)),
    st.tuples(st.just("reload"), st.just(0)),
)


@given(data=st.data(), kind=st.sampled_from(sorted(PATTERNS)), paged=st.booleans())
@settings(max_examples=60, phases=PHASES, print_blob=True)
def test_any_sequence_of_operations(kind: str, paged: bool, poison: Any, tmp_path: Path, data: st.DataObject) -> None:
    model, cache = model_and_cache(kind, "reference", poison, batch=3, max_seqlen=20, grows=True)
    if paged:
        pool = PagePool(200, 16, 2, model.head_dim, dtype=FP32, cache_dtype=FP8, k_scale=SCALES[0], v_scale=SCALES[1])
        cache = PagedKVCache(PATTERNS[kind], poisoned(pool, poison), 3, MAX_SEQLEN)
    for name, argument in data.draw(st.lists(OPERATIONS, min_size=3, max_size=12)):
        longest = max(model.lengths)
        if name == "step" and longest + argument <= MAX_SEQLEN:
            step(model, cache, argument, "reference")
        elif name == "ragged" and longest + max(argument) <= MAX_SEQLEN:
            step(model, cache, max(argument), "reference", argument)
            if paged:
                cache.lengths_are(model.lengths)
        elif name == "append" and longest + argument <= MAX_SEQLEN:
            append(model, cache, argument, "reference")
        elif name == "crop" and cache._cropped + argument <= 15 and argument <= longest:
            model.crop([argument] * 3)
            cache.crop(argument)
        elif name == "reorder":
            model.reorder(argument)
            cache.reorder(argument if paged else torch.tensor(argument))
        elif name == "reset":
            model.reset()
            cache.reset()
        elif name == "reload" and not paged:
            cache.save(tmp_path / "cache.pt")
            cache = SparseKVCache.load(tmp_path / "cache.pt")
    assert cache.seqlens.tolist() == model.lengths


def test_operators(poison: Any) -> None:
    model, cache = model_and_cache("sink and window", "reference", poison)
    append(model, cache, 40, "reference")
    ops, tensors = torch.ops.longgen_kernels, cache.tensors
    layout = (cache.tickets, None, cache.pattern.encode(), cache.layout.ring)
    written = (cache.k, cache.v, cache.seqlens)
    q, k, v = new_tokens(model, 2, 4)
    rest = ("reference", tensors.k_scale, tensors.v_scale)
    for op, args in (
        (ops.kvcache_attn, (q, *written, *layout, 0.25, -2, *rest)),
        (ops.kvcache_append, (*written, *layout, k, v, None, True, *rest)),
        (ops.kvcache_append_attn, (q, *written, *layout, k, v, None, True, 0.25, *rest)),
    ):
        # The other checks compare what was written by torch.allclose, which does not take fp8.
        torch.library.opcheck(op, args, test_utils=("test_autograd_registration", "test_faketensor"))


class Watched(TorchDispatchMode):
    """Sees every operator, and so keeps calls from being made without one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_attention_through_the_operators_is_the_same(poison: Any) -> None:
    model, cache = model_and_cache("sink and window", "reference", poison)
    append(model, cache, 40, "reference")
    with Watched():
        step(model, cache, 3, "reference")
        q, _, _ = new_tokens(model, 1, 4)
        got = longgen_attn_with_kvcache(q, cache, return_lse=True, backend="reference")
    assert_close(got, model.attend(q, [length - 1 for length in model.lengths]))


@pytest.mark.parametrize("paged", [False, True])
def test_scales_and_dtype_are_kept(paged: bool, tmp_path: Path) -> None:
    given = tuple(x.clone() for x in SCALES)
    options = {"dtype": HALF, "cache_dtype": FP8, "k_scale": given[0], "v_scale": given[1]}
    if paged:
        cache: Any = PagedKVCache(A.causal(), PagePool(4, 16, 2, 16, **options), 1, 64)
    else:
        SparseKVCache(A.causal(), 1, 2, 16, 64, **options).save(tmp_path / "cache.pt")
        cache = SparseKVCache.load(tmp_path / "cache.pt")
    for x in given:
        x.zero_()
    assert (cache.dtype, cache.k.dtype, cache.v.dtype) == (HALF, FP8, FP8)
    assert torch.equal(cache.k_scale, SCALES[0])
    assert torch.equal(cache.v_scale, SCALES[1])


# -- against a cache that does not quantise ---------------------------------------------------------------------------


def test_bytes() -> None:
    sizes = (A.sink_window(128, 2048), 1, 8, 128, 131072)
    scales = torch.ones(8)
    cache = SparseKVCache(*sizes, cache_dtype=FP8, k_scale=scales, v_scale=scales)
    assert 2 * cache.nbytes == SparseKVCache(*sizes).nbytes


def error_on_normal_data(head_dim: int, scale: float, prompt: int, steps: tuple[int, ...]) -> float:
    """Root mean square of the error of the steps' output, relative to that of the output."""
    pattern = A.sink_window(16, 512)
    scales = torch.full((2,), scale)
    exact = SparseKVCache(pattern, 2, 2, head_dim, 2000, dtype=FP32)
    cache = SparseKVCache(
        pattern, 2, 2, head_dim, 2000, dtype=FP32, cache_dtype=FP8, k_scale=scales, v_scale=scales
    )  # fmt: skip
    errors, outputs = [], []
    k, v = (torch.randn(2, prompt, 2, head_dim) for _ in range(2))
    for c in (exact, cache):
        c.append(k, v, backend="reference")
    for n in steps:
        q, k, v = (torch.randn(2, n, heads, head_dim) for heads in (8, 2, 2))
        want, got = (longgen_attn_with_kvcache(q, c, k, v, backend="reference") for c in (exact, cache))
        errors.append((got - want).flatten())
        outputs.append(want.flatten())
    return float(torch.cat(errors).norm() / torch.cat(outputs).norm())


@pytest.mark.parametrize("scale", [1 / 64, 0.013, 1.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_error_on_normal_data(head_dim: int, scale: float) -> None:
    """Rounding moves a value by up to a sixteenth, 2.6% in the mean square; so it does scores, and values."""
    assert error_on_normal_data(head_dim, scale, 700, (1, 3, 16, 1)) < 0.05
    assert error_on_normal_data(head_dim, scale, 1, (1,) * 40) < 0.05


# -- what bad calls say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_dtype": torch.float8_e5m2}, TypeError, "cache_dtype must be that of the tokens"),
        ({"cache_dtype": HALF}, TypeError, "cache_dtype must be that of the tokens"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, ValueError, "k_scale and v_scale are for cache_dtype"),
        ({"cache_dtype": FP8}, TypeError, "k_scale must be a float32 tensor .*, got NoneType"),
        ({"cache_dtype": FP8, "k_scale": torch.ones(2)}, TypeError, "v_scale must be a float32 tensor"),
        ({"cache_dtype": FP8, "k_scale": torch.ones(2).double()}, TypeError, "got torch.float64"),
        ({"cache_dtype": FP8, "k_scale": torch.ones(3)}, ValueError, r"k_scale must be \(2,\)"),
        ({"cache_dtype": FP8, "k_scale": torch.tensor([1.0, 0])}, ValueError, r"positive, .* got \[1.0, 0.0\]"),
        ({"cache_dtype": FP8, "k_scale": torch.tensor([1.0, torch.nan])}, ValueError, "positive, finite"),
        ({"cache_dtype": FP8, "k_scale": torch.tensor([1.0, 1e-40])}, ValueError, "finite reciprocal"),
        ({"dtype": FP8}, TypeError, "dtype must be float16"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"dtype": BF16, **options}
    with pytest.raises(error, match=message):
        SparseKVCache(A.causal(), 1, 2, 16, 64, **options)
    with pytest.raises(error, match=message):
        PagePool(4, 16, 2, 16, **options)


def test_tokens_and_queries_have_the_dtype_that_the_cache_was_made_for() -> None:
    k_scale, v_scale = SCALES
    cache = SparseKVCache(A.causal(), 1, 2, 16, 64, dtype=HALF, cache_dtype=FP8, k_scale=k_scale, v_scale=v_scale)
    x = torch.randn(1, 3, 2, 16)
    with pytest.raises(TypeError, match=r"k must have the cache's dtype torch.float16, got torch.float32"):
        cache.append(x, x)
    with pytest.raises(TypeError, match=r"q must have the cache's dtype torch.float16, got torch.float32"):
        longgen_attn_with_kvcache(x, cache)
    with pytest.raises(TypeError, match=r"k must have the cache's dtype torch.float16, got torch.float8"):
        cache.append(x.to(FP8), x.to(FP8))
    assert explain_append(cache)["reference"] is None


def test_pairs_of_tensors_have_no_scales() -> None:
    x = torch.empty(1, 32, 2, 64, dtype=FP8)
    with pytest.raises(NotImplementedError, match=r"k_cache is .*, but a pair of tensors has no scales"):
        longgen_attn_with_kvcache(
            torch.empty(1, 1, 4, 64, dtype=HALF), (x, x), cache_seqlens=torch.ones(1, dtype=torch.int32)
        )


def test_pages_are_saved_as_bytes_and_need_a_pool_of_the_same_scales(tmp_path: Path) -> None:
    pools = [
        PagePool(9, 16, 2, 16, dtype=FP32, cache_dtype=FP8, k_scale=scale, v_scale=SCALES[1])
        for scale in (SCALES[0], SCALES[0], 2 * SCALES[0])
    ]
    cache = PagedKVCache(A.causal(), pools[0], 1, 128)
    q, k, v = (torch.randn(1, 40, heads, 16) for heads in (4, 2, 2))
    cache.append(k, v)
    cache.save(tmp_path / "cache.pt")
    loaded = PagedKVCache.load(tmp_path / "cache.pt", pools[1])
    outs = [longgen_attn_with_kvcache(q[:, -1:], each) for each in (cache, loaded)]
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match="the pool's scales are"):
        PagedKVCache.load(tmp_path / "cache.pt", pools[2])
