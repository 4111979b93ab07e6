"""The reference backend against softmax over the whole score matrix in fp64, masked by `visible`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_cases import Case, dense, make_inputs, named_cases, packed, patterns_of_every_kind, random_mask
from attention_checks import assert_same_infinities, attend, plain_attention, results
from attention_strategies import KINDS, random_cases
from hypothesis import given
from hypothesis import strategies as st

from longgen_kernels import AttentionPattern, longgen_attn_func
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.kernels.reference import attention as reference

FP64 = torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TILE = 32
PATTERNS = patterns_of_every_kind(TILE)


def assert_equals_plain_attention(case: Case, device: str = "cpu") -> None:
    """Output, LSE and all gradients, to fp64 precision."""
    inputs = make_inputs(case, device)
    want = results(inputs.to(FP64), plain_attention)
    for name, got in results(inputs, attend, backend="reference").items():
        assert got.is_contiguous() or name in ("dq", "dk", "dv"), name
        assert_same_infinities(got, want[name], name)
        torch.testing.assert_close(
            got, want[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", named_cases(TILE), ids=str)
def test_named_case(case: Case, device: str, poison: object) -> None:
    assert_equals_plain_attention(case.at(FP64, case.head_dim), device)


@pytest.mark.parametrize("kind", PATTERNS)
def test_every_kind_of_pattern(kind: str) -> None:
    heads = {"q_heads": 4, "kv_heads": 2, "dtype": FP64}
    assert_equals_plain_attention(dense(kind, PATTERNS[kind], 3 * TILE + 9, **heads))
    assert_equals_plain_attention(packed(kind, PATTERNS[kind], (TILE + 9, 5, 64), (TILE + 9, 96, 7), **heads))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_random_cases(kind: str, data: st.DataObject) -> None:
    assert_equals_plain_attention(data.draw(random_cases(kind, [(FP64, 8, 1), (FP64, 5, 2)], longest=100)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """16-bit inputs are computed in fp32: the result is the fp64 one but for a rounding, the LSE stays fp32."""
    inputs = make_inputs(dense("rounded", PATTERNS["strided blocks"], 70).at(dtype, 32), "cpu")
    want = results(inputs.to(FP64), plain_attention)
    for name, got in results(inputs, attend, backend="reference").items():
        assert got.dtype == (torch.float32 if name == "lse" else dtype)
        rounding = torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(), want[name], rtol=rounding, atol=2e-5 if dtype == torch.float32 else rounding
        )


def test_softmax_scale_scales_the_scores() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=FP64) for _ in range(3))
    pattern = AttentionPattern.causal()
    scaled = longgen_attn_func(q, k, v, pattern, softmax_scale=0.7, return_lse=True)
    same = longgen_attn_func(q * 0.7 * 8**0.5, k, v, pattern, return_lse=True)
    torch.testing.assert_close(scaled, same)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATTERNS)
def test_gradients_pass_gradcheck_through_output_and_lse(kind: str) -> None:
    pattern = PATTERNS[kind]
    leaves = [torch.randn(1, n, heads, 3, dtype=FP64, requires_grad=True) for n, heads in ((5, 4), (7, 2), (7, 2))]

    def finite_results(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = longgen_attn_func(*qkv, pattern, return_lse=True, q_start=33, k_start=29)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(finite_results, leaves)


@pytest.mark.parametrize("case", named_cases(TILE), ids=str)
def test_the_written_out_gradient_is_the_oracles(case: Case) -> None:
    """`attn_bwd` against autograd through `attention`, the same arithmetic without a gradient of its own."""
    inputs = make_inputs(case.at(FP64, 8), "cpu")

    def oracle(_: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_start = case.q_starts[0] if case.q_starts else (case.k_starts or (0,))[0] + k.shape[1] - q.shape[1]
        starts = (0, 0) if case.packed else (q_start, (case.k_starts or (0,))[0])
        packing = (inputs.cu_q, inputs.cu_k, inputs.q_starts, inputs.k_starts)
        problem = AttentionProblem(q, k, v, inputs.pattern, case.head_dim**-0.5, *starts, *packing)
        return reference.attention(problem)

    case = inputs.case
    if 0 in (inputs.q.numel(), inputs.k.numel()):
        pytest.skip("the operators answer calls without a row or a key themselves")
    got, want = results(inputs, attend, backend="reference"), results(inputs, oracle)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


def test_rows_that_see_nothing_take_no_gradient_in_and_give_none() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=FP64, requires_grad=True) for _ in range(3))
    out, lse = longgen_attn_func(q, k, v, AttentionPattern.causal(), return_lse=True, q_start=0, k_start=3)
    assert (out[:, :3] == 0).all()
    assert (lse[..., :3] == -torch.inf).all()
    assert lse[..., 3:].isfinite().all()
    for grad in torch.autograd.grad((out[:, :3].sum(), lse[..., :3].sum()), (q, k, v)):
        assert (grad == 0).all()


# -- tiling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_elements", [1, 97, 4 * 50 * 7])
@pytest.mark.parametrize("kind", ["bidirectional", "strided blocks with per-head phases", "block mask of two heads"])
def test_row_tiles_join_without_a_seam(kind: str, tile_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.TILE_ELEMENTS, "cpu", tile_elements)
    heads = {"q_heads": 4, "kv_heads": 2, "dtype": FP64}
    assert_equals_plain_attention(dense(kind, PATTERNS[kind], 50, batch=1, **heads))
    assert_equals_plain_attention(packed(kind, PATTERNS[kind], (50, 3, 9), (20, 3, 40), spare_rows=4, **heads))


def test_scores_stay_below_the_tile_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile of scores exceeds TILE_ELEMENTS, unless a single row of it does."""
    monkeypatch.setitem(reference.TILE_ELEMENTS, "cpu", 1000)
    sizes = []
    scores = reference._scores

    def recorded(*args: object) -> tuple[torch.Tensor, ...]:
        tile = scores(*args)
        sizes.append(tile[0].numel())
        return tile

    monkeypatch.setattr(reference, "_scores", recorded)
    q = torch.randn(2, 30, 4, 8, requires_grad=True)
    longgen_attn_func(q, q, q, AttentionPattern.causal()).sum().backward()
    assert len(sizes) == 2 * 8  # forward and backward in tiles of 1000 // (2 * 4 * 30) = 4 of the 30 rows
    assert max(sizes) <= 1000


MEMORY_PROBE = """
import resource, torch
from longgen_kernels import AttentionPattern, longgen_attn_func
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
torch.set_num_threads(1)
q = torch.randn(1, 64, 1, 16, requires_grad=True)
longgen_attn_func(q, q, q, AttentionPattern.causal()).sum().backward()  # whatever torch loads when first used
before = used()
q, k, v = (torch.randn(1, 8192, 1, 16, requires_grad=True) for _ in range(3))
longgen_attn_func(q, k, v, AttentionPattern.sink_window(4, 128)).sum().backward()
print(used() - before)
"""


def test_eight_thousand_tokens_take_a_few_hundred_megabytes() -> None:
    """The whole score matrix in fp32 is 256 MB, of which backward would hold several; tiles of 64 MB it may hold."""
    run = subprocess.run([sys.executable, "-c", MEMORY_PROBE], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 600


def test_a_mask_larger_than_the_sequence_gives_what_its_prefix_gives() -> None:
    large = random_mask(8, 8, 16, seed=3)
    inputs = make_inputs(dense("prefix", large, 40, dtype=FP64), "cpu")
    small = type(large).from_dense(large.to_dense()[:, :3, :3], 16)
    for one, other in zip(
        attend(inputs, inputs.q, inputs.k, inputs.v),
        longgen_attn_func(inputs.q, inputs.k, inputs.v, small, return_lse=True),
        strict=True,
    ):
        assert torch.equal(one, other)
