"""The Hopper attention kernel against the reference, through the public functions."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest
import torch
from attention_cases import A, Case, dense, make_inputs, named_cases, packed, patterns_of_every_kind
from attention_checks import assert_as_accurate_as_plain_pytorch, attend, check_nan_query, results
from attention_strategies import KINDS, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from longgen_kernels import explain_attention, longgen_attn_func
from longgen_kernels.kernels.cuda import available

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or available() is not None,
        reason="needs a Hopper GPU and the compiled extension",
    ),
]
HALF, BF16 = torch.float16, torch.bfloat16
SIZE = 256  # of patterns: their blocks are then 128 tokens and more


def runs(case: Case) -> bool:
    """Whether the kernel takes the case; what it does not take runs on Triton and is tested there."""
    inputs = make_inputs(case, "cuda")
    q, k, v = (x if x.ndim == 4 else x[None] for x in (inputs.q, inputs.k, inputs.v))
    if k.shape[0] != q.shape[0] or k.numel() == 0:
        return False
    return explain_attention(q, k, v, A.causal())["cuda"] is None


def check(case: Case) -> None:
    """Forward on the Hopper kernel, backward on whatever is fastest: together as accurate as plain PyTorch."""
    inputs = make_inputs(case, "cuda")
    with torch.no_grad():
        out, lse = attend(inputs, inputs.q, inputs.k, inputs.v, backend="auto")
    got = results(inputs, attend)
    assert torch.equal(got["out"], out)
    assert torch.equal(got["lse"], lse)
    assert_as_accurate_as_plain_pytorch(got, inputs)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("case", named_cases(), ids=str)
def test_named_case(case: Case, dtype: torch.dtype, head_dim: int, poison: object) -> None:
    case = case.at(dtype, head_dim)
    if not runs(case):
        pytest.skip("not for this kernel")
    check(case)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("size", [128, SIZE])
@pytest.mark.parametrize("kind", patterns_of_every_kind(SIZE))
def test_every_kind_of_pattern(kind: str, size: int, is_packed: bool, head_dim: int, poison: object) -> None:
    pattern = patterns_of_every_kind(size)[kind]
    heads = {"q_heads": 4, "kv_heads": 2}
    case = dense(kind, pattern, 2 * size + 9, 3 * size + 9, batch=2, **heads)
    if is_packed:
        case = packed(kind, pattern, (size + 9, 5, 2 * size), (size + 9, 3 * size, 7), **heads)
    check(case.at(BF16, head_dim))


@pytest.mark.parametrize("kind", ["causal", "sink and window", "strided blocks with per-head phases"])
def test_lengths_around_the_ends_of_tiles(kind: str, poison: object) -> None:
    pattern = patterns_of_every_kind(SIZE)[kind]
    near = [tile + d for tile in (32, 64, 128, 256, 1024) for d in (-1, 0, 1)] + [1, 1500]
    for seqlen_q, seqlen_k in zip(near, near[5:] + near[:5], strict=True):
        check(dense("ragged", pattern, seqlen_q, seqlen_k, q_heads=4, kv_heads=2).at(BF16, 128))
    check(packed("all", pattern, tuple(near), q_heads=4, kv_heads=2).at(BF16, 128))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=256, print_blob=True)  # times 8 kinds
def test_random_cases(kind: str, data: st.DataObject) -> None:
    case = data.draw(random_cases(kind, [(BF16, 128, 1), (HALF, 128, 4), (BF16, 64, 2)], longest=600))
    inputs = make_inputs(case, "cuda")
    assert_as_accurate_as_plain_pytorch(results(inputs, attend, gradients=False, backend="auto"), inputs)


def test_takes_every_kind_of_pattern_and_says_what_it_does_not_take() -> None:
    q = torch.randn(1, 300, 4, 128, dtype=BF16, device="cuda")
    for pattern in (A.causal(), A.bidirectional(), A.sink_window(4, 100), A.strided(4, 128, window=100)):
        assert explain_attention(q, q, q, pattern)["cuda"] is None
    for x, pattern, word in (
        (q.float(), A.causal(), "float32"),
        (q[..., :96], A.causal(), "got 96"),
        (q, A.strided(4, 8, window=100), "16 tokens, got 8"),
    ):
        assert word in str(explain_attention(x, x, x, pattern)["cuda"])


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("pattern", [A.causal(), A.sink_window(100, 500), A.strided(3, 64, window=200)], ids=str)
def test_scores_that_outgrow_the_reference_of_the_first_tile(pattern: A, dtype: torch.dtype) -> None:
    """Weights are relative to the first tile's maximum until a later tile's are out of bounds; both kinds of growth."""
    generator = torch.Generator("cuda").manual_seed(0)
    for scales in ((1, 3), (1, 8, 60), (1, 100, 2, 500)):
        q, k, v = (torch.randn(2, 2500, 4, 128, dtype=dtype, device="cuda", generator=generator) for _ in range(3))
        pick = torch.randint(len(scales), (2, 40, 4, 1), device="cuda", generator=generator)
        k *= torch.tensor(scales, device="cuda", dtype=dtype)[pick].repeat_interleave(64, 1)[:, :2500]
        out, lse = longgen_attn_func(q, k, v, pattern, return_lse=True, backend="cuda")
        true, true_lse = longgen_attn_func(
            q.float(), k.float(), v.float(), pattern, return_lse=True, backend="reference"
        )
        torch.testing.assert_close(out.float(), true, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, true_lse, atol=1e-3, rtol=1e-5)


def test_a_nan_query_shows_in_its_own_row_and_nowhere_else() -> None:
    check_nan_query("cuda", 128, BF16, "cuda")


def test_a_thread_that_has_done_nothing_on_the_device() -> None:
    """Threads have no CUDA context until the runtime gives them one; the driver's tensor maps need it."""
    q, k, v, dout = (torch.randn(1, 100, 2, 128, dtype=BF16, device="cuda") for _ in range(4))
    q.requires_grad_()
    want = longgen_attn_func(q, k, v, A.causal(), backend="cuda")
    (want_dq,) = torch.autograd.grad(want, q, dout, retain_graph=True)
    code = """if True:
        import torch, sys, threading
        from longgen_kernels import AttentionPattern, longgen_attn_func
        q, k, v, dout, want, want_dq = torch.load(sys.argv[1], map_location="cuda")
        q.requires_grad_()
        out = longgen_attn_func(q, k, v, AttentionPattern.causal(), backend="cuda")
        out.backward(dout)  # autograd's thread begins with this kernel
        assert torch.allclose(q.grad, want_dq, atol=1e-2)
        got = []
        thread = threading.Thread(target=lambda: got.append(longgen_attn_func(q, k, v, AttentionPattern.causal())))
        thread.start(); thread.join()
        assert torch.equal(got[0], want)
    """
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save([x.detach() for x in (q, k, v, dout, want, want_dq)], file.name)
        done = subprocess.run([sys.executable, "-c", code, file.name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_repeated_runs_are_bitwise_equal() -> None:
    q, k, v = (torch.randn(2, 3000, 8, 128, dtype=BF16, device="cuda") for _ in range(3))
    first = longgen_attn_func(q, k, v, A.sink_window(100, 1000), backend="cuda")
    for _ in range(1000):
        assert torch.equal(longgen_attn_func(q, k, v, A.sink_window(100, 1000), backend="cuda"), first)
