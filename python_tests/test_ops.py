"""The operators as torch sees them: opcheck, torch.compile, checkpointing, CUDA graphs; and what bad calls say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import INTERPRETED, TILE, A, Case, cumulated, dense, make_inputs, packed, random_mask
from attention_checks import attend, results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from longgen_kernels import BlockMask, explain_attention, longgen_attn_func, longgen_attn_varlen_func
from longgen_kernels.kernels import reference, triton

STRIDED = A.strided(3, TILE // 2, window=TILE // 2 + 3, sink=3)
MASK = random_mask(8, 8, max(TILE // 2, 16), heads=2, seed=1)
CASES = [
    dense("dense", STRIDED, 2 * TILE + 5, kv_heads=2),
    packed("packed", STRIDED, (TILE + 5, 0, 9), spare_rows=3),
    packed("packed with starts", STRIDED, (TILE, 9), (7, TILE), q_starts=(9, 3), k_starts=(2, 0)),
    dense("block mask", MASK, 2 * TILE + 5),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
op, op_bwd = torch.ops.longgen_kernels.attn_fwd, torch.ops.longgen_kernels.attn_bwd
ON_GPU = pytest.param("triton", marks=pytest.mark.gpu)
BACKENDS = ["reference", ON_GPU]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def inputs_for(case: Case, backend: str, seed: int = 0) -> Any:
    """fp32 and a small head_dim on the CPU, bf16 and 64 on a GPU."""
    precision = (torch.bfloat16, 64) if backend == "triton" else (torch.float32, 16)
    return make_inputs(case.at(*precision), device_of(backend), seed)


def operator_arguments(inputs: Any, backend: str) -> tuple[Any, ...]:
    """What follows q, k and v in a call of either operator."""
    mask = inputs.pattern if isinstance(inputs.pattern, BlockMask) else None
    lists = (mask.rows, mask.cols) if mask else (None, None)
    packing = (inputs.cu_q, inputs.cu_k, inputs.q_starts, inputs.k_starts)
    return (inputs.pattern.encode(), *lists, 0.25, 0, 0, *packing, False, backend)


@pytest.mark.parametrize("how", ["argument", "torch"])
def test_deterministic_reaches_the_gradient(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def attn_bwd(problem: Any, *rest: Any) -> Any:
        asked.append(problem.deterministic)
        return torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)

    monkeypatch.setattr(reference, "attn_bwd", attn_bwd)
    x = torch.randn(1, 9, 2, 16, requires_grad=True)
    longgen_attn_func(x, x, x, STRIDED, backend="reference").sum().backward()
    if how == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    longgen_attn_func(x, x, x, STRIDED, backend="reference", deterministic=how == "argument").sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_opcheck(case: Case, backend: str) -> None:
    inputs = inputs_for(case, backend)
    rest = operator_arguments(inputs, backend)
    leaves = [x.nan_to_num().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    torch.library.opcheck(op, (*leaves, *rest))
    qkv = [x.detach() for x in leaves]
    out, lse = op(*qkv, *rest)
    for dlse in (inputs.dlse, None):
        torch.library.opcheck(op_bwd, (inputs.dout, dlse, out, lse, *qkv, *rest))


@cases
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    inputs = inputs_for(case, "reference")
    real = results(inputs, attend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        out, lse = attend(inputs, q, k, v)
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.empty_like(out), torch.empty_like(lse)))
    for fake, value in zip((out, lse, *grads), real.values(), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (value.shape, value.dtype, value.stride())


def test_the_fake_lse_of_double_precision_is_double() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 16, dtype=torch.float64)
        out, lse = longgen_attn_func(q, q, q, A.causal(), return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_compiles_without_graph_breaks(case: Case, backend: str) -> None:
    inputs = inputs_for(case, backend)
    compiler = "inductor" if backend == "triton" else "aot_eager"

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(inputs, q, k, v, backend=backend)
        return out * 2, lse + 1

    want = results(inputs, lambda _, *qkv: step(*qkv))
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    got = results(inputs, lambda _, *qkv: compiled(*qkv))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["dense", "packed", "block mask"])
def test_a_new_length_breaks_no_graph(kind: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pattern = MASK if kind == "block mask" else STRIDED

    def step(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None) -> Tensor:
        if cu is None:
            return longgen_attn_func(q, k, v, pattern)
        return longgen_attn_varlen_func(q, k, v, pattern, cu, cu, 128, 128)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (24, 41, 67, 96, 110):
        q, k, v = (torch.randn(*((n,) if kind == "packed" else (2, n)), 2, 16, requires_grad=True) for _ in range(3))
        cu = cumulated((n - 7, 7), "cpu") if kind == "packed" else None
        got, want = compiled(q, k, v, cu), step(q, k, v, cu)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (got, want)))
    assert counter.frame_count == 1


# -- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_activation_checkpointing_changes_nothing(case: Case, backend: str) -> None:
    inputs = inputs_for(case, backend)
    want = results(inputs, attend, backend=backend)
    got = results(inputs, lambda i, *qkv: checkpoint(attend, i, *qkv, backend=backend, use_reentrant=False))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("needed", range(3))
def test_a_gradient_asked_for_alone_is_the_same(needed: int) -> None:
    inputs = inputs_for(CASES[0], "reference")
    want = results(inputs, attend)
    leaves = [x.detach().requires_grad_(i == needed) for i, x in enumerate((inputs.q, inputs.k, inputs.v))]
    (grad,) = torch.autograd.grad(attend(inputs, *leaves), leaves[needed], (inputs.dout, inputs.dlse))
    assert torch.equal(grad, want[("dq", "dk", "dv")[needed]])


def test_a_second_derivative_raises() -> None:
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(longgen_attn_func(q, q, q, A.causal()).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_no_graph_is_kept_without_gradients() -> None:
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    with torch.no_grad():
        out = longgen_attn_func(q, q, q, A.causal())
    assert not out.requires_grad
    assert longgen_attn_func(q, q, q, A.causal()).requires_grad


# -- no rows at all ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)])
def test_empty_tensors(batch: int, seqlen_q: int, seqlen_k: int, backend: str) -> None:
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    leaves = [torch.randn(batch, n, 2, 16, device=device_of(backend), requires_grad=True) for n in lengths]
    out, lse = longgen_attn_func(*leaves, STRIDED, return_lse=True, backend=backend)
    assert out.shape == leaves[0].shape
    assert lse.shape == (batch, 2, seqlen_q)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for grad, leaf in zip(torch.autograd.grad(out.sum() + lse.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


# -- bad calls --------------------------------------------------------------------------------------------------------

Q, K, V = torch.randn(2, 8, 4, 16), torch.randn(2, 6, 2, 16), torch.randn(2, 6, 2, 16)
CU_Q, CU_K = cumulated((3, 5), "cpu"), cumulated((2, 4), "cpu")
HUGE = 1 << 30
SMALL_MASK = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), 16)


def fixed(q: Any = Q, k: Any = K, v: Any = V, pattern: Any = STRIDED, **options: Any) -> Any:
    return longgen_attn_func(q, k, v, pattern, **options)


def varlen(q: Any = Q[0], k: Any = K[0], v: Any = V[0], pattern: Any = STRIDED, cu_q: Any = CU_Q, cu_k: Any = CU_K,
           longest: Any = 5, longest_k: Any = 4, **options: Any) -> Any:  # fmt: skip
    return longgen_attn_varlen_func(q, k, v, pattern, cu_q, cu_k, longest, longest_k, **options)


BAD_CALLS: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "q must be a torch.Tensor, got list", lambda: fixed(q=[1])),
    (TypeError, "v must be a torch.Tensor, got NoneType", lambda: fixed(v=None)),
    (ValueError, r"q must be \(batch, seqlen, heads, head_dim\), got shape \(8, 4, 16\)", lambda: fixed(q=Q[0])),
    (ValueError, r"k must be \(total, heads, head_dim\), got shape \(2, 6, 2, 16\)", lambda: varlen(k=K)),
    (TypeError, "q must be float16, .*, got torch.int32", lambda: fixed(q=Q.int())),
    (TypeError, "k must have q's dtype torch.float32, got torch.float16", lambda: fixed(k=K.half())),
    (ValueError, "k must be on q's device cpu, got meta", lambda: fixed(k=K.to("meta"))),
    (ValueError, "q needs at least one head and head_dim >= 1", lambda: fixed(q=Q[..., :0, :])),
    (ValueError, "v needs at least one head and head_dim >= 1", lambda: fixed(v=V[..., :0])),
    (ValueError, "v must have stride 1 in head_dim, got strides", lambda: fixed(v=V.mT.contiguous().mT)),
    (ValueError, r"k and v must have one shape, got \(2, 6, 2, 16\) and \(2, 5, 2, 16\)", lambda: fixed(v=V[:, :5])),
    (ValueError, "q and k must have one head_dim, got 8 and 16", lambda: fixed(q=Q[..., :8])),
    (ValueError, "q and k must have one batch size, got 1 and 2", lambda: fixed(q=Q[:1])),
    (ValueError, r"q heads \(3\) must be a multiple of kv heads \(2\)", lambda: fixed(q=Q[:, :, :3])),
    (TypeError, "pattern must be an AttentionPattern or a BlockMask, got str", lambda: fixed(pattern="causal")),
    (ValueError, f"query positions must stay below {HUGE}, got up to {HUGE + 1}", lambda: fixed(q_start=HUGE - 7)),
    (ValueError, f"key positions must stay below {HUGE}", lambda: fixed(q_start=0, k_start=HUGE - 5)),
    (ValueError, "mask's 3 heads must divide q's 4 heads", lambda: fixed(pattern=random_mask(2, 2, 16, heads=3))),
    (ValueError, "the block mask is on meta, q on cpu", lambda: fixed(pattern=MASK.to("meta"))),
    (ValueError, "covers 32 query and 32 key positions, the call needs 33 and 6",
     lambda: fixed(pattern=SMALL_MASK, q_start=25)),
    (ValueError, "covers 32 query and 32 key .* needs 33 and 33", lambda: fixed(pattern=SMALL_MASK, k_start=27)),
    (ValueError, "covers 32 query and 32 key .* needs 33 and 33", lambda: varlen(pattern=SMALL_MASK, longest_k=33)),
    (TypeError, "softmax_scale must be a float or None, got str", lambda: fixed(softmax_scale="1")),
    (TypeError, "softmax_scale must be a float or None, got bool", lambda: fixed(softmax_scale=True)),
    (ValueError, "softmax_scale must be positive and finite, got 0", lambda: fixed(softmax_scale=0)),
    (ValueError, "softmax_scale must be positive and finite, got nan", lambda: fixed(softmax_scale=float("nan"))),
    (TypeError, "q_start must be an int, got float 1.0", lambda: fixed(q_start=1.0)),
    (TypeError, "k_start must be an int, got Tensor", lambda: fixed(k_start=torch.tensor(1))),
    (ValueError, "q_start must be at least 0, got -1", lambda: fixed(q_start=-1)),
    (ValueError, "k_start must be at least 0, got -2", lambda: fixed(k_start=-2)),
    (TypeError, "deterministic must be a bool, got 1", lambda: fixed(deterministic=1)),
    (ValueError, "backend is 'fast'; valid are", lambda: fixed(backend="fast")),
    (TypeError, "cu_seqlens_q must be a torch.Tensor, got list", lambda: varlen(cu_q=[0, 3, 8])),
    (TypeError, "cu_seqlens_k must be int32, got torch.int64", lambda: varlen(cu_k=CU_K.long())),
    (ValueError, r"cu_seqlens_q must be \(batch \+ 1,\) .* got shape \(1,\)", lambda: varlen(cu_q=CU_Q[:1])),
    (ValueError, r"cu_seqlens_k must be \(batch \+ 1,\)", lambda: varlen(cu_k=CU_K[None])),
    (ValueError, "cu_seqlens_k must be contiguous", lambda: varlen(cu_k=CU_K.repeat_interleave(2)[::2])),
    (ValueError, "cu_seqlens_q must be on q's device cpu, got meta", lambda: varlen(cu_q=CU_Q.to("meta"))),
    (ValueError, "must have one length, got 2 and 3", lambda: varlen(cu_q=CU_Q[::2].contiguous())),
    (TypeError, "max_seqlen_q must be an int, got Tensor", lambda: varlen(longest=torch.tensor(5))),
    (ValueError, "max_seqlen_k must be at least 0, got -1", lambda: varlen(longest_k=-1)),
    (TypeError, r"q_start must be an int32 tensor \(batch,\) or None, got 3", lambda: varlen(q_start=3)),
    (TypeError, "k_start must be an int32 tensor", lambda: varlen(k_start=torch.zeros(2, dtype=torch.int64))),
    (ValueError, r"q_start must be contiguous \(batch,\) on cpu", lambda: varlen(q_start=CU_Q)),
    (NotImplementedError, "cuda: takes CUDA tensors, got cpu tensors", lambda: fixed(backend="cuda")),
]  # fmt: skip


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any backend that is asked to compute fails the test."""

    def launched(*_: object) -> None:
        raise AssertionError("a kernel was launched")

    for backend in (reference, triton):
        monkeypatch.setattr(backend, "attn_fwd", launched)


@pytest.mark.parametrize(("error", "message", "call"), BAD_CALLS, ids=[message for _, message, _ in BAD_CALLS])
def test_a_bad_call_says_what_is_wrong_before_anything_runs(
    error: type[Exception], message: str, call: Callable[[], object], no_launch: None
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_table_of_bad_calls_starts_from_good_ones() -> None:
    assert fixed().shape == Q.shape
    assert varlen().shape == Q[0].shape
    assert fixed(pattern=SMALL_MASK, q_start=24).shape == Q.shape


# -- dispatch ---------------------------------------------------------------------------------------------------------


def test_an_explanation_names_every_backend_and_runs_nothing(no_launch: None) -> None:
    reasons = explain_attention(Q, K, V, STRIDED)
    assert list(reasons) == ["cuda", "triton", "reference"]
    assert reasons["reference"] is None
    assert reasons["cuda"]
    assert (reasons["triton"] is None) == INTERPRETED


@pytest.mark.parametrize(("dtype", "head_dim", "reason"), [
    (torch.float64, 16, "takes float16, bfloat16 and float32, got float64"),
    (torch.float32, 12, "takes head_dim 8 to 256 in multiples of 8, got 12"),
    (torch.float32, 264, "takes head_dim 8 to 256 in multiples of 8, got 264"),
])  # fmt: skip
def test_triton_says_what_it_cannot_do(
    dtype: torch.dtype, head_dim: int, reason: str, triton_device: str, no_launch: None
) -> None:
    q = torch.randn(1, 4, 1, head_dim, dtype=dtype, device=triton_device)
    assert explain_attention(q, q, q, STRIDED)["triton"] == reason
    with pytest.raises(NotImplementedError, match=f"triton: {reason}"):
        longgen_attn_func(q, q, q, STRIDED, backend="triton")


def test_an_environment_variable_replaces_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGGEN_BACKEND", "cuda")
    with pytest.raises(NotImplementedError, match="LONGGEN_BACKEND=cuda"):
        fixed()
    assert fixed(backend="reference").shape == Q.shape
    monkeypatch.setenv("LONGGEN_BACKEND", "fastest")
    with pytest.raises(ValueError, match="LONGGEN_BACKEND is 'fastest'"):
        fixed()


@pytest.mark.gpu
def test_a_gpu_tensor_never_falls_to_the_reference() -> None:
    q = torch.randn(1, 4, 1, 12, device="cuda")
    with pytest.raises(NotImplementedError, match='backend="reference" runs it in plain PyTorch'):
        longgen_attn_func(q, q, q, STRIDED)
    assert longgen_attn_func(q, q, q, STRIDED, backend="reference").is_cuda


@pytest.mark.gpu
def test_block_masks_are_built_and_used_without_waiting_for_the_device() -> None:
    dense_mask = torch.rand(2, 8, 8, device="cuda") < 0.5
    q, k, v = (torch.randn(1, 512, 2, 64, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(3))

    def run() -> None:
        longgen_attn_func(q, k, v, BlockMask.from_dense(dense_mask, 64), backend="triton").sum().backward()

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- CUDA graphs and compiled kernels ---------------------------------------------------------------------------------


@pytest.mark.gpu
@cases
def test_a_cuda_graph_replays_forward_and_backward_with_new_inputs(case: Case) -> None:
    """New numbers in the same memory, and for packed batches new lengths too."""
    inputs, new = (inputs_for(case, "triton", seed) for seed in (0, 1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(inputs, attend, backend="triton")  # compiles before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = results(inputs, attend, backend="triton")

    if case.packed and case.q_starts is None:
        new.cu_q.copy_(cumulated((7, TILE, 3), "cuda"))
        new.cu_k.copy_(new.cu_q)
    for name in ("q", "k", "v", "dout", "dlse", "cu_q", "cu_k"):
        if getattr(inputs, name) is not None:
            getattr(inputs, name).copy_(getattr(new, name))
    graph.replay()
    for name, value in results(new, attend, backend="triton").items():
        assert torch.equal(replayed[name], value), name


def compiled_kernels() -> int:
    """How many kernels Triton has compiled for attention so far, on all devices."""
    from longgen_kernels.kernels.triton import backward, forward

    kernels = [
        forward.attn_fwd_kernel,
        backward.bwd_rows_kernel,
        backward.attn_bwd_dq_kernel,
        backward.attn_bwd_dkdv_kernel,
    ]
    # The first entry of a device's caches maps what a kernel is specialised on to the kernel.
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make", [dense, lambda name, pattern, n: packed(name, pattern, (n, 3 * n + 1))], ids=["dense", "packed"]
)
def test_new_lengths_windows_and_strides_compile_nothing(make: Callable[..., Case]) -> None:
    def run(pattern: A, n: int) -> None:
        results(inputs_for(make("cached", pattern, n), "triton"), attend, backend="triton")

    def pattern(i: int) -> A:
        return A.strided(2 + i, 128 << i, window=100 * i + 1, sink=i, head_phase_offset=i)

    run(pattern(0), 16)
    warm = compiled_kernels()
    assert warm >= 4
    for i, n in enumerate((1, 2, 15, 17, 64, 100, 1000, 1024)):
        run(pattern(i % 5), n)
    assert compiled_kernels() == warm
    run(A.sink_window(4, 64), 100)  # another kind of pattern: the count does count
    assert compiled_kernels() > warm
