"""merge_attn_states: the reference against the formula in fp64, the kernels against the reference."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longgen_kernels.merge import explain_merge, merge_attn_states

INF = float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-23}  # of one rounding to the dtype
if os.environ.get("TRITON_INTERPRET") == "1":
    EPS[torch.bfloat16] *= 2  # Triton's interpreter truncates to bf16
op = torch.ops.longgen_kernels.merge_attn_states
op_bwd = torch.ops.longgen_kernels.merge_attn_states_bwd
KERNELS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
States = tuple[Tensor, Tensor, Tensor, Tensor]


def make_states(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", empty_rows: bool = True
) -> States:
    """Two states; with `empty_rows` some rows are -inf in a, in b and in both, and hold NaN."""
    batch, seqlen, heads, _ = shape
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for _ in range(2):
        out, lse = torch.randn(*shape), torch.randn(batch, heads, seqlen) * 3
        if empty_rows:
            empty = torch.rand(batch, heads, seqlen) < 0.3
            lse[empty] = -INF
            out.transpose(1, 2)[empty] = float("nan")
        outs.append(out.to(device, dtype))
        lses.append(lse.to(device, lse_dtype))
    return outs[0], lses[0], outs[1], lses[1]


def by_formula(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in fp64, where an empty state's output counts as 0."""
    a, b = lse_a.double(), lse_b.double()
    lse = torch.logaddexp(a, b)
    out = torch.zeros_like(out_a, dtype=torch.float64)
    for part, part_lse in ((out_a, a), (out_b, b)):
        weight = torch.where(part_lse == -INF, 0, torch.exp(part_lse - lse)).transpose(1, 2)[..., None]
        out += weight * torch.where(weight == 0, 0, part.double())
    return out, lse


def assert_close_to_formula(result: tuple[Tensor, Tensor], states: States) -> None:
    out, lse = result
    want_out, want_lse = (x.to(out.device) for x in by_formula(*states))
    assert out.dtype == states[0].dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    # One rounding of the result, and a few of fp32 on the way.
    torch.testing.assert_close(out.double(), want_out, rtol=EPS.get(out.dtype, 1e-12), atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=2e-6)


def kernel_device(backend: str, triton_device: str) -> str:
    return "cuda" if backend == "cuda" else triton_device


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reference_is_the_formula(dtype: torch.dtype) -> None:
    states = make_states(2, 17, 3, 24, dtype=dtype)
    assert_close_to_formula(merge_attn_states(*states, backend="reference"), states)


def test_halves_of_attention_merge_into_the_whole() -> None:
    scores, values = torch.randn(2, 3, 11, 40).double(), torch.randn(2, 3, 40, 16).double()

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        part = scores[..., keys]
        return (part.softmax(-1) @ values[:, :, keys]).transpose(1, 2), part.logsumexp(-1)

    out, lse = merge_attn_states(*attend(slice(0, 13)), *attend(slice(13, 40)))
    torch.testing.assert_close((out, lse), attend(slice(0, 40)))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("lse_a", [-INF, -(2.0**100), -200.0, 0.0, 3e4, INF])
@pytest.mark.parametrize("lse_b", [-INF, 1.5, 3e4])
def test_extreme_lse(backend: str, lse_a: float, lse_b: float, triton_device: str) -> None:
    """Both -inf gives 0 and -inf; one -inf copies the other exactly; +inf outweighs every finite number."""
    device = "cpu" if backend == "reference" else kernel_device(backend, triton_device)
    out_a, out_b = torch.full((1, 1, 1, 8), 2.0, device=device), torch.full((1, 1, 1, 8), -3.0, device=device)
    lses = [torch.full((1, 1, 1), value, device=device) for value in (lse_a, lse_b)]
    if lse_a == -INF:
        out_a.fill_(float("nan"))
    if lse_b == -INF:
        out_b.fill_(INF)
    out, lse = merge_attn_states(out_a, lses[0], out_b, lses[1], backend=backend)
    assert not out.isnan().any()
    if lse_a == lse_b == -INF:
        assert (out == 0).all()
        assert lse.item() == -INF
    elif -INF in (lse_a, lse_b) or abs(lse_a - lse_b) > 120:
        assert torch.equal(out, out_a if lse_a > lse_b else out_b)
        assert lse.item() == max(lse_a, lse_b)
    elif lse_a == lse_b:
        torch.testing.assert_close(out, torch.full_like(out, -0.5))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 64), (2, 37, 3, 64), (1, 9, 5, 128), (2, 3, 2, 80), (1, 20, 1, 256), (3, 2, 1, 7), (1, 1, 9, 1)]
)
def test_kernels_match_the_formula(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: str, poison: object
) -> None:
    states = make_states(*shape, dtype=dtype, device=kernel_device(backend, triton_device))
    assert_close_to_formula(merge_attn_states(*states, backend=backend), states)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 37, 3, 64), (1, 9, 5, 128), (2, 3, 2, 80), (3, 2, 1, 7)])
def test_kernel_gradients_match_the_reference(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], triton_device: str, poison: object
) -> None:
    states = make_states(*shape, dtype=dtype, device=kernel_device(backend, triton_device))
    dout, dlse = torch.randn_like(states[0]).nan_to_num(), torch.randn_like(states[1]).nan_to_num()
    got = op_bwd(dout, dlse, *states, backend)
    want = op_bwd(dout.double(), dlse.double(), *(x.double() for x in states), "reference")
    for x, y, like in zip(got, want, states, strict=True):
        assert x.dtype == like.dtype
        assert x.is_contiguous()
        tolerance = EPS[dtype] if x.dim() == 4 else 1e-5
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance if x.dim() == 3 else 2e-6)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("offset", [0, 1])
def test_strided_inputs(backend: str, offset: int, triton_device: str, poison: object) -> None:
    """(B, H, S, D) storage for a, a slice of a fused projection for b, transposed LSEs; also off 16-byte boundaries."""
    device = "cpu" if backend == "reference" else kernel_device(backend, triton_device)
    states = make_states(2, 10, 4, 32, dtype=torch.bfloat16, device=device)
    out_a = states[0].transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.full((2, 10, 3, 4, 32 + 8 * offset), float("nan"), dtype=torch.bfloat16, device=device)
    out_b = fused[:, :, 1, :, offset : 32 + offset]
    out_b.copy_(states[2])
    lse_a = states[1].transpose(1, 2).contiguous().transpose(1, 2)
    lse_b = torch.stack([states[3]] * 2, dim=-1)[..., 0]
    assert not any(x.is_contiguous() for x in (out_a, lse_a, out_b, lse_b))
    strided = (out_a, lse_a, out_b, lse_b)
    assert_close_to_formula(merge_attn_states(*strided, backend=backend), states)

    grads = torch.randn(1, device=device, dtype=torch.bfloat16).expand(2, 10, 4, 32), torch.randn_like(lse_a)
    for x, y in zip(
        op_bwd(*grads, *strided, backend), op_bwd(*(g.contiguous() for g in grads), *states, backend), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_varlen_is_a_batch_of_one(backend: str, triton_device: str) -> None:
    device = "cpu" if backend == "reference" else kernel_device(backend, triton_device)
    states = make_states(1, 13, 2, 16, device=device)
    out, lse = merge_attn_states(*(x[0] for x in states), backend=backend)
    assert out.shape == (13, 2, 16)
    assert lse.shape == (2, 13)
    assert_close_to_formula((out[None], lse[None]), states)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 4, 2, 16), (2, 0, 2, 16), (2, 4, 0, 16)])
def test_empty_tensors(backend: str, shape: tuple[int, ...], triton_device: str) -> None:
    device = "cpu" if backend == "reference" else kernel_device(backend, triton_device)
    states = tuple(x.requires_grad_() for x in make_states(*shape, device=device))
    out, lse = merge_attn_states(*states, backend=backend)
    (out.sum() + lse.sum()).backward()
    assert out.shape == shape
    assert states[0].grad is not None
    assert states[0].grad.shape == shape


def test_gradcheck() -> None:
    states = make_states(1, 3, 2, 4, dtype=torch.float64, empty_rows=False)
    assert torch.autograd.gradcheck(merge_attn_states, tuple(x.requires_grad_() for x in states))


def test_gradients_of_empty_rows_are_zero() -> None:
    states = tuple(x.requires_grad_() for x in make_states(2, 9, 3, 8))
    out, lse = merge_attn_states(*states)
    (out.square().sum() + lse[lse > -INF].sum()).backward()
    for out_x, lse_x in (states[:2], states[2:]):
        empty = lse_x == -INF
        assert empty.any()
        assert (out_x.grad.transpose(1, 2)[empty] == 0).all()
        assert (lse_x.grad[empty] == 0).all()
        assert out_x.grad.isfinite().all()
        assert lse_x.grad.isfinite().all()


def test_second_derivative_raises() -> None:
    states = tuple(x.requires_grad_() for x in make_states(1, 2, 1, 4))
    out, _ = merge_attn_states(*states)
    (grad,) = torch.autograd.grad(out.nansum(), states[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_opcheck() -> None:
    states = tuple(x.requires_grad_() for x in make_states(2, 5, 3, 16))
    torch.library.opcheck(op, (*states, "auto"))
    grads = torch.randn(2, 5, 3, 16), torch.randn(2, 3, 5)
    torch.library.opcheck(op_bwd, (*grads, *(x.detach() for x in states), "auto"))


def test_compiles_without_graph_breaks() -> None:
    def step(*states: Tensor) -> Tensor:
        out, lse = merge_attn_states(*states)
        return (out * out).sum() + lse.sum()

    states = make_states(2, 6, 2, 8, empty_rows=False)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in states]
        function(*leaves).backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(*grads)


BAD: list[tuple[type[Exception], str, Callable[[States], list[object]]]] = [
    (TypeError, "lse_b must be a tensor, got float", lambda s: [*s[:3], 1.0]),
    (TypeError, r"out_a is torch.int32; valid are", lambda s: [s[0].int(), *s[1:]]),
    (TypeError, "out_b is torch.float16; it must be out_a's", lambda s: [*s[:2], s[2].half(), s[3]]),
    (TypeError, "lse_a is torch.float16; .* must be torch.float32", lambda s: [s[0], s[1].half(), *s[2:]]),
    (ValueError, r"out_b has shape \(2, 3, 4, 4\)", lambda s: [*s[:2], s[2][..., :4].contiguous(), s[3]]),
    (ValueError, r"lse_b has shape \(2, 3, 4\); .* \(2, 4, 3\)", lambda s: [*s[:3], s[3].transpose(1, 2)]),
    (ValueError, "out_a has strides .* last one must be 1", lambda s: [s[0].mT.contiguous().mT, *s[1:]]),
    (ValueError, r"out_a has shape \(3,\); valid are", lambda s: [torch.ones(3), *s[1:]]),
    (ValueError, "lse_a is on meta; it must be on out_a's device", lambda s: [s[0], s[1].to("meta"), *s[2:]]),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_arguments(error: type[Exception], message: str, change: Callable[[States], list[object]]) -> None:
    with pytest.raises(error, match=message):
        merge_attn_states(*change(make_states(2, 3, 4, 8)))


def test_bad_backends() -> None:
    states = make_states(1, 2, 1, 4)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        merge_attn_states(*states, backend="fast")
    with pytest.raises(NotImplementedError, match="cuda: takes CUDA tensors, got cpu tensors"):
        merge_attn_states(*states, backend="cuda")
    assert explain_merge(states[0])["reference"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnGpu:
    def test_bitwise_repeatable(self, backend: str) -> None:
        states = make_states(2, 1000, 8, 128, dtype=torch.bfloat16, device="cuda")
        grads = torch.randn_like(states[0]).nan_to_num(), torch.randn_like(states[1]).nan_to_num()
        runs = [(*op(*states, backend), *op_bwd(*grads, *states, backend)) for _ in range(3)]
        for one, *others in zip(*runs, strict=True):
            assert all(torch.equal(one, other) for other in others)

    def test_offsets_beyond_32_bits(self, backend: str) -> None:
        """Tokens lie 2^28 elements apart in one buffer, so that the last starts past 2^31."""
        tokens, heads, head_dim = 10, 2, 64
        buffer = torch.zeros(tokens << 28, dtype=torch.float16, device="cuda")
        far = buffer.as_strided((1, tokens, heads, head_dim), (tokens << 28, 1 << 28, head_dim, 1))
        states = make_states(1, tokens, heads, head_dim, dtype=torch.float16, device="cuda")
        far.copy_(states[0])
        near = op(*states, backend)
        for got, want in zip(op(far, *states[1:], backend), near, strict=True):
            assert torch.equal(got, want)

    def test_more_elements_than_32_bits_count(self, backend: str) -> None:
        batch, seqlen, heads, head_dim = 2, 1 << 17, 65, 128
        out_a = torch.ones(batch, seqlen, heads, head_dim, dtype=torch.bfloat16, device="cuda")
        assert out_a.numel() > 1 << 31
        out_b, lse = out_a.expand_as(out_a) * 3, torch.zeros(batch, heads, seqlen, device="cuda")
        out, _ = op(out_a, lse, out_b, lse, backend)
        assert out.min() == out.max() == 2
        del out
        dout_a, _, dout_b, _ = op_bwd(out_a, lse, out_a, lse, out_b, lse, backend)
        assert dout_a.min() == dout_b.max() == 0.5

    def test_cuda_graph(self, backend: str) -> None:
        states = make_states(1, 300, 4, 64, dtype=torch.bfloat16, device="cuda")
        merge_attn_states(*states, backend=backend)  # compiles and loads before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = merge_attn_states(*states, backend=backend)
        for x, y in zip(states, make_states(1, 300, 4, 64, dtype=torch.bfloat16, device="cuda"), strict=True):
            x.copy_(y)
        graph.replay()
        assert_close_to_formula((out, lse), states)

    def test_runs_on_the_current_stream(self, backend: str) -> None:
        states = make_states(1, 4096, 8, 128, dtype=torch.bfloat16, device="cuda")
        expected = op(*states, backend)
        torch.cuda.synchronize()
        late = [torch.empty_like(x) for x in states]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # on another stream the kernel would read `late` before it is written
            for x, y in zip(late, states, strict=True):
                x.copy_(y)
            got = op(*late, backend)
        stream.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))

    def test_chosen_and_explained(self, backend: str) -> None:
        assert explain_merge(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"))[backend] is None

    def test_double_precision_has_no_kernel(self, backend: str) -> None:
        states = make_states(1, 2, 1, 8, dtype=torch.float64, device="cuda")
        with pytest.raises(NotImplementedError, match=r"no kernel for torch\.float64"):
            merge_attn_states(*states, backend=backend)
        with pytest.raises(NotImplementedError, match='backend="reference"'):
            merge_attn_states(*states)

    def test_on_a_second_gpu(self, backend: str) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        states = make_states(1, 50, 4, 64, device="cuda:1")
        assert_close_to_formula(merge_attn_states(*states, backend=backend), states)
