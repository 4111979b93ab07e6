"""The Hopper backward kernel against the reference, through the public functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_cases import A, Case, dense, make_inputs, named_cases, packed, patterns_of_every_kind
from attention_checks import assert_as_accurate_as_plain_pytorch, attend, results
from attention_strategies import KINDS, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longgen_kernels import BlockMask, longgen_attn_func
from longgen_kernels.kernels import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or cuda.available() is not None,
        reason="needs a Hopper GPU and the compiled extension",
    ),
]
HALF, BF16 = torch.float16, torch.bfloat16
SIZE = 256  # of patterns: their blocks are then 128 tokens, or much smaller


@pytest.fixture(scope="module")
def launches() -> Iterator[list[None]]:
    """One entry for each run of the kernel: without it a case that fell to Triton would pass."""
    runs: list[None] = []

    def counted(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        runs.append(None)
        return original(*args)

    original, cuda.attn_bwd = cuda.attn_bwd, counted
    yield runs
    cuda.attn_bwd = original


def takes(case: Case, deterministic: bool = False) -> bool:
    """Whether the kernel takes the case; what it does not take runs on Triton and is tested there."""
    if deterministic and isinstance(case.pattern, A) and case.pattern.stride and (case.pattern.block_size or 0) < 16:
        return False
    if case.layout == "odd" or (isinstance(case.pattern, BlockMask) and case.pattern.block_size < 128):
        return False
    return sum(case.seqlens_q) + case.spare_rows > 0 and sum(case.seqlens_k) + case.spare_rows > 0


def check(case: Case, launches: list[None], *, deterministic: bool = False) -> None:
    """Forward on whatever is fastest, backward on the Hopper kernel: together as accurate as plain PyTorch."""
    inputs = make_inputs(case, "cuda")
    before = len(launches)
    got = results(inputs, attend, deterministic=deterministic)
    assert len(launches) == before + takes(case, deterministic)
    assert_as_accurate_as_plain_pytorch(got, inputs)


HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])


@HEAD_DIMS
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("case", named_cases(), ids=str)
def test_named_case(
    case: Case, dtype: torch.dtype, deterministic: bool, head_dim: int, launches: list[None], poison: object
) -> None:
    case = case.at(dtype, head_dim)
    if not takes(case, deterministic):
        pytest.skip("not for this kernel")
    check(case, launches, deterministic=deterministic)


@HEAD_DIMS
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", patterns_of_every_kind(SIZE))
def test_every_kind_of_pattern(
    kind: str, is_packed: bool, deterministic: bool, head_dim: int, launches: list[None], poison: object
) -> None:
    pattern = patterns_of_every_kind(SIZE)[kind]
    heads = {"q_heads": 4, "kv_heads": 2}
    case = dense(kind, pattern, 2 * SIZE + 9, 3 * SIZE + 9, batch=2, **heads)
    if is_packed:
        case = packed(kind, pattern, (SIZE + 9, 5, 2 * SIZE), (SIZE + 9, 3 * SIZE, 7), **heads)
    check(case.at(BF16, head_dim), launches, deterministic=deterministic)


@HEAD_DIMS
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_lengths_around_the_ends_of_tiles(kind: str, head_dim: int, launches: list[None], poison: object) -> None:
    pattern = patterns_of_every_kind(SIZE)[kind]
    near = [tile + d for tile in (32, 64, 128, 256, 1024) for d in (-1, 0, 1)] + [1, 1500]
    for seqlen_q, seqlen_k in zip(near, near[5:] + near[:5], strict=True):
        check(dense("ragged", pattern, seqlen_q, seqlen_k, q_heads=4, kv_heads=2).at(BF16, head_dim), launches)
    check(packed("all", pattern, tuple(near), q_heads=4, kv_heads=2).at(BF16, head_dim), launches)


@HEAD_DIMS
@pytest.mark.parametrize("kind", ["sink and window", "strided blocks with per-head phases", "stride of one"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_global_keys_of_few_heads_are_divided(
    kind: str, kv_heads: int, head_dim: int, launches: list[None], poison: object
) -> None:
    """A whole GPU for one or two heads: the long tiles' queries are shared out in chunks."""
    from longgen_kernels import _C

    pattern = patterns_of_every_kind(SIZE)[kind]
    case = dense("few heads", pattern, 4096 + 9, batch=1, q_heads=2, kv_heads=kv_heads).at(BF16, head_dim)
    sizes = {"batch": 1, "seqlen_q": case.seqlens_q[0], "seqlen_k": case.seqlens_k[0], "q_start": 0, "k_start": 0}
    heads = {"q_heads": 2, "kv_heads": kv_heads, "head_dim": head_dim}
    counts = _C.attn_bwd_sm90_workspace(
        pattern=pattern.encode(), **sizes, **heads, packed=False, deterministic=False, multiprocessors=132
    )  # fmt: skip
    assert counts["partials"] > 0
    check(case, launches)


@HEAD_DIMS
@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
@pytest.mark.parametrize(("seqlen_q", "q_heads", "kv_heads"), [(2000, 64, 64), (1333, 64, 32)])
def test_blocks_take_many_items(
    kind: str, seqlen_q: int, q_heads: int, kv_heads: int, head_dim: int, launches: list[None], poison: object
) -> None:
    """Some eight a block, one after the other in the same shared memory."""
    pattern = patterns_of_every_kind(SIZE)[kind]
    case = dense("many heads", pattern, seqlen_q, 2000, batch=1, q_heads=q_heads, kv_heads=kv_heads)
    check(case.at(BF16, head_dim), launches)


SHAPES = [(BF16, 128, 1), (HALF, 64, 4), (BF16, 64, 2), (HALF, 128, 4), (BF16, 128, 2), (BF16, 64, 1)]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=128, print_blob=True)  # times 8 kinds
def test_random_cases(kind: str, launches: list[None], data: st.DataObject) -> None:
    case = data.draw(random_cases(kind, SHAPES, longest=600))
    deterministic = data.draw(st.booleans())
    if takes(case, deterministic):
        check(case, launches, deterministic=deterministic)


# -- how training calls it --------------------------------------------------------------------------------------------

PATTERN = A.strided(4, 128, window=200, sink=9)


def leaves(seqlen: int = 700, head_dim: int = 128) -> tuple[list[Tensor], Tensor]:
    """q, k and v that want a gradient, and a gradient of the output."""
    q, k, v, dout = (torch.randn(1, seqlen, heads, head_dim, dtype=BF16, device="cuda") for heads in (4, 2, 2, 4))
    return [x.requires_grad_() for x in (q, k, v)], dout


def attention(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Tensor:
    return longgen_attn_func(q, k, v, PATTERN, **options)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*inputs), inputs, dout)


def assert_equal_but_for_the_order_of_dq(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@HEAD_DIMS
def test_dk_and_dv_are_bitwise_equal_run_to_run(head_dim: int, poison: object) -> None:
    inputs, dout = leaves(6000, head_dim)
    first = gradients(attention, inputs, dout)
    for _ in range(50):
        assert_equal_but_for_the_order_of_dq(gradients(attention, inputs, dout), first)


@HEAD_DIMS
def test_deterministic_gradients_are_bitwise_equal_run_to_run(head_dim: int, poison: object) -> None:
    inputs, dout = leaves(6000, head_dim)
    first = gradients(functools.partial(attention, deterministic=True), inputs, dout)
    assert_equal_but_for_the_order_of_dq(gradients(attention, inputs, dout), first)
    for _ in range(50):
        again = gradients(functools.partial(attention, deterministic=True), inputs, dout)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


def test_activation_checkpointing() -> None:
    inputs, dout = leaves()
    again = gradients(lambda *x: checkpoint(attention, *x, use_reentrant=False), inputs, dout)
    assert_equal_but_for_the_order_of_dq(again, gradients(attention, inputs, dout))


def test_torch_compile() -> None:
    inputs, dout = leaves()
    compiled = torch.compile(attention, fullgraph=True)
    assert_equal_but_for_the_order_of_dq(gradients(compiled, inputs, dout), gradients(attention, inputs, dout))


def test_the_graph_can_be_used_twice() -> None:
    inputs, dout = leaves()
    out = attention(*inputs)
    first = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    assert_equal_but_for_the_order_of_dq(torch.autograd.grad(out, inputs, dout), first)


@pytest.mark.parametrize("stored", ["heads first", "expanded", "every second element"])
def test_output_gradients_of_any_strides(stored: str) -> None:
    inputs, dout = leaves()
    if stored == "heads first":
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    elif stored == "expanded":
        dout = dout[:, :1].expand(dout.shape)
    else:
        dout = dout.repeat_interleave(2, dim=-1)[..., ::2]
    want = gradients(attention, inputs, dout.contiguous())
    assert_equal_but_for_the_order_of_dq(gradients(attention, inputs, dout), want)


def test_runs_on_the_current_stream() -> None:
    """Gradients that are written late on a side stream: a kernel on another stream would read NaN."""
    inputs, dout = leaves()
    want = gradients(attention, inputs, dout)
    late = torch.full_like(dout, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = attention(*inputs)
        torch.cuda._sleep(50_000_000)
        late.copy_(dout)
        got = torch.autograd.grad(out, inputs, late)
    stream.synchronize()
    assert_equal_but_for_the_order_of_dq(got, want)


def test_several_streams_at_once() -> None:
    problems = [leaves(3000) for _ in range(4)]
    want = [gradients(attention, *problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    got = []
    for stream, problem in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            got.append(gradients(attention, *problem))
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        assert_equal_but_for_the_order_of_dq(one, other)


def test_graph_capture() -> None:
    inputs, dout = leaves()
    want = gradients(attention, inputs, dout)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(attention, inputs, dout)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = gradients(attention, inputs, dout)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_equal_but_for_the_order_of_dq(got, want)
