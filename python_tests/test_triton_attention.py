"""The Triton kernels against the reference, on a GPU at real tile sizes or under Triton's interpreter at small ones."""

from __future__ import annotations

import pytest
import torch
from attention_cases import INTERPRETED, TILE, A, Case, dense, make_inputs, named_cases, packed, patterns_of_every_kind
from attention_checks import Results, assert_as_accurate_as_plain_pytorch, attend, check_nan_query, results
from attention_strategies import KINDS, random_cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longgen_kernels import longgen_attn_func, longgen_attn_varlen_func

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
GPU_ONLY = pytest.mark.gpu
DTYPES = [HALF, FP32] if INTERPRETED else [HALF, BF16, FP32]  # the interpreter multiplies the bits of bf16 matrices
PRECISIONS = [(BF16, 64), (HALF, 128)]
# Dense 16-bit tensors go through the bulk tensor copy engine, all others through pointers.
DENSE, PACKED = ([(HALF, 16)], [(FP32, 16)]) if INTERPRETED else (PRECISIONS, PRECISIONS)
# (dtype, head_dim, query heads per kv head); head_dims of multiples of 16, so that strides do not add kernels.
SHAPES = [(FP32, 16, 1), (FP32, 32, 2), (HALF, 16, 2)]
if not INTERPRETED:
    SHAPES = [(BF16, 64, 1), (HALF, 128, 4), (BF16, 128, 2), (FP32, 32, 1), (HALF, 80, 3)]
# Under the interpreter it takes minutes to look for a smaller example of a failure.
PHASES = [p for p in Phase if not (INTERPRETED and p in (Phase.shrink, Phase.explain))]


def check(case: Case, device: str) -> Results:
    """Forward and backward on Triton are as accurate as plain PyTorch."""
    inputs = make_inputs(case, device)
    got = results(inputs, attend, backend="triton")
    assert_as_accurate_as_plain_pytorch(got, inputs)
    return got


def at_every_precision(cases: list[Case]) -> list[object]:
    return [
        pytest.param(case.at(dtype, max(case.head_dim, head_dim)), id=f"{case}-{str(dtype)[6:]}")
        for case in cases
        for dtype, head_dim in (PACKED if case.packed else DENSE)
    ]


def cases_of_every_kind(tile: int) -> list[Case]:
    heads = {"q_heads": 4, "kv_heads": 2}
    cases = []
    for kind, pattern in patterns_of_every_kind(tile).items():
        cases.append(dense(kind, pattern, 2 * tile + 9, 3 * tile + 9, batch=1, **heads))
        cases.append(packed(f"packed {kind}", pattern, (tile + 9, 5, 2 * tile), (tile + 9, 3 * tile, 7), **heads))
    return cases


@pytest.mark.parametrize("case", at_every_precision(named_cases()))
def test_named_case(case: Case, triton_device: str, poison: object) -> None:
    check(case, triton_device)


@pytest.mark.parametrize("case", at_every_precision(cases_of_every_kind(TILE)))
def test_every_kind_of_pattern(case: Case, triton_device: str, poison: object) -> None:
    check(case, triton_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 192, 256])
def test_head_dims_and_dtypes(dtype: torch.dtype, head_dim: int, triton_device: str, poison: object) -> None:
    pattern = A.strided(3, TILE // 2, window=TILE // 2, sink=3)
    case = dense("head_dim", pattern, 2 * TILE + 5, batch=1, q_heads=2 if INTERPRETED else 4, kv_heads=1)
    check(case.at(dtype, head_dim), triton_device)


@GPU_ONLY
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_lengths_around_the_ends_of_tiles(kind: str, poison: object) -> None:
    pattern = patterns_of_every_kind(TILE)[kind]
    near = [tile + d for tile in (32, 64, 128, 256, 1024) for d in (-1, 0, 1)] + [1, 1500]
    for seqlen_q, seqlen_k in zip(near, near[5:] + near[:5], strict=True):
        check(dense("ragged", pattern, seqlen_q, seqlen_k, q_heads=4, kv_heads=2).at(BF16, 128), "cuda")
        check(dense("square", pattern, seqlen_q, q_heads=4, kv_heads=2).at(BF16, 128), "cuda")
    check(packed("all", pattern, tuple(near), q_heads=4, kv_heads=2).at(BF16, 128), "cuda")


@GPU_ONLY
@pytest.mark.parametrize("kind", patterns_of_every_kind(1024))
def test_four_thousand_tokens(kind: str, poison: object) -> None:
    case = dense(kind, patterns_of_every_kind(1024)[kind], 4096, batch=1, q_heads=4, kv_heads=2)
    check(case.at(BF16, 128), "cuda")


# -- random cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=3 if INTERPRETED else 64, phases=PHASES, print_blob=True)  # times 8 kinds
def test_random_cases(kind: str, triton_device: str, data: st.DataObject) -> None:
    case = data.draw(random_cases(kind, SHAPES, longest=2 * TILE if INTERPRETED else 600))
    check(case, triton_device)


# -- NaN, very many tiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_nan_query_shows_in_its_own_row_and_nowhere_else(backend: str, triton_device: str) -> None:
    check_nan_query(backend, 32, HALF, triton_device)


@pytest.mark.parametrize("is_packed", [False, True])
def test_no_grid_axis_but_the_first_grows_with_length_or_sequences(is_packed: bool, triton_device: str) -> None:
    from longgen_kernels.kernels.problem import AttentionProblem
    from longgen_kernels.kernels.triton import attention, attention_unsupported

    q = torch.empty(1, 1 << 24, 2, 16, dtype=HALF, device="meta")
    cu = torch.empty(100_001, dtype=torch.int32, device="meta")
    problem = AttentionProblem(q, q, q, A.sink_window(4, 64), 1.0)
    if is_packed:
        problem = AttentionProblem(q[0], q[0], q[0], A.sink_window(4, 64), 1.0, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert attention_unsupported(problem) is None
    for grid in (attention._query_grid(problem, 64), attention._key_grid(problem, 64)[0]):
        assert grid[0] < 1 << 31
        assert max(grid[1:]) <= 65535


@pytest.mark.parametrize("repeats", [7, pytest.param(23_000, marks=GPU_ONLY)])
def test_many_packed_sequences_of_a_token_or_two(repeats: int, triton_device: str) -> None:
    """A token that sees itself alone puts out its own value, and its value's gradient is that of the output."""
    few = (1, 0, 2)
    case = packed("many", A.sink_window(1, 2), few * repeats, q_heads=2, kv_heads=1).at(HALF, 16)
    inputs = make_inputs(case, triton_device)
    got = results(inputs, attend, backend="triton")
    token = torch.arange(3 * repeats, device=triton_device) % 3  # alone, first of two, second of two
    torch.testing.assert_close(got["out"][token < 2], inputs.v[token < 2].expand(-1, 2, -1))
    dout = inputs.dout[token == 0].float().sum(1, keepdim=True)
    torch.testing.assert_close(got["dv"][token == 0].float(), dout, atol=1e-2, rtol=1e-2)
    assert all(value.isfinite().all() for value in got.values())


# -- repeatability, streams -------------------------------------------------------------------------------------------


def repeatable_case() -> Case:
    scale = 1 if INTERPRETED else 8  # enough programs on a GPU for their order to vary
    pattern = A.strided(4, TILE // 2, window=TILE, sink=9)
    return dense("repeated", pattern, scale * 3 * TILE + 5, q_heads=2 * scale, kv_heads=2).at(*DENSE[0])


def test_deterministic_runs_are_bitwise_equal(triton_device: str, poison: object) -> None:
    inputs = make_inputs(repeatable_case(), triton_device)
    first, *others = (
        results(inputs, attend, backend="triton", deterministic=True) for _ in range(2 if INTERPRETED else 4)
    )
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), f"{name} differs between two runs"


@GPU_ONLY
def test_runs_on_the_current_stream() -> None:
    """Inputs that are written late on a side stream: a kernel on another stream would read NaN."""
    inputs = make_inputs(repeatable_case(), "cuda")
    expected = results(inputs, attend, backend="triton")
    tensors = (inputs.q, inputs.k, inputs.v)
    late = make_inputs(repeatable_case(), "cuda")
    for x in (late.q, late.k, late.v):
        x.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, y in zip((late.q, late.k, late.v), tensors, strict=True):
            x.copy_(y)
        got = results(late, attend, backend="triton")
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@GPU_ONLY
def test_several_streams_at_once() -> None:
    inputs = [make_inputs(repeatable_case(), "cuda", seed) for seed in range(4)]
    expected = [results(one, attend, backend="triton") for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got = []
    for stream, one in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            got.append(results(one, attend, backend="triton"))
    torch.cuda.synchronize()
    for one, other in zip(expected, got, strict=True):
        for name, value in one.items():
            assert torch.equal(other[name], value), name


# -- offsets past 2^31 elements ---------------------------------------------------------------------------------------

ROWS, HEADS, DIM = 136, 2, 64
BETWEEN_TILES = A.strided(2, 16, window=20, sink=3)


def compare_with_near_memory(far: list[torch.Tensor], lengths: tuple[int, int] | None) -> None:
    """Attention on views that reach past 2^31 elements gives what it gives on compact copies of them."""
    assert any(sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) >= 1 << 31 for x in far)
    runs = []
    for q, k, v, dout in (far, [x.clone(memory_format=torch.contiguous_format) for x in far]):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if lengths is None:
            out = longgen_attn_func(*leaves, BETWEEN_TILES, backend="triton")
        else:
            cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
            out = longgen_attn_varlen_func(*leaves, BETWEEN_TILES, cu, cu, ROWS, ROWS, backend="triton")
        runs.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for got, want in zip(*runs, strict=True):
        assert want.abs().sum() > 0
        assert torch.equal(got, want)


@GPU_ONLY
@pytest.mark.parametrize("is_packed", [False, True])
def test_fused_projection_with_rows_past_two_billion_elements(is_packed: bool) -> None:
    """q, k, v and dO are slices of rows that lie 2^24 elements apart: 4.6 GB, and the last row starts past 2^31."""
    row = 1 << 24
    buffer = torch.full((ROWS * row,), float("nan"), dtype=HALF, device="cuda")
    size, strides = (1, ROWS, HEADS, DIM), (ROWS * row, row, DIM, 1)
    far = [buffer.as_strided(size, strides, i * HEADS * DIM) for i in range(4)]
    for x in far:
        x.normal_()
    if is_packed:
        far = [x[0] for x in far]
    compare_with_near_memory(far, (70, ROWS - 70) if is_packed else None)


@GPU_ONLY
def test_batch_stride_past_two_billion_elements() -> None:
    """The third sequence starts at 2^31 elements in each tensor, as in 16 sequences of 128K tokens."""
    stride, size = 1 << 30, (3, ROWS, HEADS, DIM)
    each = ROWS * HEADS * DIM
    buffer = torch.full((2 * stride + 4 * each,), float("nan"), dtype=HALF, device="cuda")
    far = [buffer.as_strided(size, (stride, HEADS * DIM, DIM, 1), i * each) for i in range(4)]
    for x in far:
        x.normal_()
    compare_with_near_memory(far, None)


@GPU_ONLY
@pytest.mark.parametrize("is_packed", [False, True])
def test_outputs_of_more_than_two_billion_elements(is_packed: bool) -> None:
    """129 query heads that are one head in memory, at 128K tokens: out and dQ hold 2.2e9 elements, all heads equal."""
    seqlen, heads, dim = 1 << 17, 129, 128
    pattern = A.sink_window(16, 96)
    q, k, v = (torch.randn(1, seqlen, 1, dim, dtype=HALF, device="cuda") for _ in range(3))
    dout = torch.randn(1, seqlen, 1, dim, dtype=HALF, device="cuda")
    cu = torch.tensor([0, seqlen // 3, seqlen], dtype=torch.int32, device="cuda")
    runs = []
    for n in (heads, 1):
        leaves = [q.expand(-1, -1, n, -1).detach().requires_grad_(), k.detach().requires_grad_(), v]
        if is_packed:
            out = longgen_attn_varlen_func(*(x[0] for x in leaves), pattern, cu, cu, seqlen, seqlen, backend="triton")[
                None
            ]
        else:
            out = longgen_attn_func(*leaves, pattern, backend="triton")
        dq, dk = torch.autograd.grad(out, leaves[:2], dout.expand(-1, -1, n, -1))
        runs.append((out.detach(), dq, dk))
    (out, dq, dk), (one_out, one_dq, one_dk) = runs
    assert out.numel() > 1 << 31
    for many, one in ((out, one_out), (dq, one_dq)):
        for lo in range(0, seqlen, 1 << 14):
            chunk = slice(lo, lo + (1 << 14))
            torch.testing.assert_close(many[:, chunk], one[:, chunk].expand(-1, -1, heads, -1), rtol=1e-3, atol=1e-3)
    error = (dk.float() - heads * one_dk.float()).abs().max()
    # The tensor cores truncate when they accumulate: over millions of rows the first keys' sums lose a percent.
    assert error <= 2e-2 * heads * one_dk.float().abs().max()
