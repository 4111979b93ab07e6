"""Running an attention case, and judging what came out by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_cases import Case, Inputs
from torch import Tensor

from longgen_kernels import AttentionPattern, BlockMask, longgen_attn_func, longgen_attn_varlen_func

INF = float("inf")
# Units in the last place; fp32 sums of a few hundred terms differ by some in another order.
ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 64}
Results = dict[str, Tensor]  # "out", "lse", "dq", "dk" and "dv"


def attend(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE by the public function that the case calls for."""
    case = inputs.case
    if not case.packed:
        starts = {"q_start": case.q_starts[0] if case.q_starts else None}
        starts |= {"k_start": case.k_starts[0] if case.k_starts else 0}
        return longgen_attn_func(q, k, v, inputs.pattern, return_lse=True, **starts, **options)
    assert inputs.cu_q is not None
    assert inputs.cu_k is not None
    return longgen_attn_varlen_func(
        q,
        k,
        v,
        inputs.pattern,
        inputs.cu_q,
        inputs.cu_k,
        max(case.seqlens_q) + max(case.q_starts or (0,)),
        max(case.seqlens_k) + max(case.k_starts or (0,)),
        return_lse=True,
        q_start=inputs.q_starts,
        k_start=inputs.k_starts,
        **options,
    )


def plain_attention(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the whole score matrix, in the dtype of q: the least that a kernel's accuracy is measured by."""
    case, pattern = inputs.case, inputs.pattern
    if not case.packed:
        start = case.q_starts[0] if case.q_starts else None
        return _plain(case, pattern, q, k, v, start, case.k_starts[0] if case.k_starts else 0)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -INF, dtype=q.dtype, device=q.device)
    q_lo = k_lo = 0
    outs, lses = [], []
    for b, (n_q, n_k) in enumerate(zip(case.seqlens_q, case.seqlens_k, strict=True)):
        one = (q[None, q_lo : q_lo + n_q], k[None, k_lo : k_lo + n_k], v[None, k_lo : k_lo + n_k])
        starts = (case.q_starts[b] if case.q_starts else None, case.k_starts[b] if case.k_starts else 0)
        part_out, part_lse = _plain(case, pattern, *one, *starts)
        outs.append(part_out[0])
        lses.append(part_lse[0])
        q_lo, k_lo = q_lo + n_q, k_lo + n_k
    return torch.cat([*outs, out[q_lo:]]), torch.cat([*lses, lse[:, q_lo:]], dim=1)


def _plain(
    case: Case, pattern: Any, q: Tensor, k: Tensor, v: Tensor, q_start: int | None, k_start: int
) -> tuple[Tensor, Tensor]:
    heads = pattern.heads if isinstance(pattern, BlockMask) else case.kv_heads
    mask = pattern.visible(q.shape[1], k.shape[1], heads=heads, q_start=q_start, k_start=k_start, device=q.device)
    mask = mask.repeat_interleave(case.q_heads // heads, dim=0)
    k, v = (x.repeat_interleave(case.q_heads // case.kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    scores = scores.masked_fill(~mask, -INF)
    blind = ~mask.any(-1, keepdim=True)
    probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v), scores.logsumexp(-1)


def results(
    inputs: Inputs, function: Callable[..., tuple[Tensor, Tensor]], *, gradients: bool = True, **options: Any
) -> Results:
    """Output, LSE and all three gradients of `function(inputs, q, k, v, **options)`."""
    if not gradients:
        with torch.no_grad():
            return dict(zip(("out", "lse"), function(inputs, inputs.q, inputs.k, inputs.v, **options), strict=True))
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out, lse = function(inputs, *leaves, **options)
    upstream = [(y, dy.to(y.dtype)) for y, dy in ((out, inputs.dout), (lse, inputs.dlse)) if dy is not None]
    outputs, doutputs = [y for y, _ in upstream], [dy for _, dy in upstream]
    # The LSE does not depend on v: its gradient is then zero.
    grads = torch.autograd.grad(outputs, leaves, doutputs, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def assert_same_infinities(got: Tensor, want: Tensor, name: str) -> None:
    assert got.shape == want.shape, name
    assert not got.isnan().any(), f"{name} holds NaN"
    assert torch.equal(got.isinf(), want.isinf()), f"{name} is infinite elsewhere"


def assert_as_accurate_as_plain_pytorch(got: Results, inputs: Inputs) -> None:
    """No result in `got` is off by more than twice what plain PyTorch in the same dtype is, plus a rounding or two.

    The truth is the reference on the same numbers in the next wider dtype.
    """
    dtype = inputs.case.dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    gradients = "dq" in got
    truth = results(inputs.to(wider), attend, gradients=gradients, backend="reference")
    plain = results(inputs.to(dtype), plain_attention, gradients=gradients)
    if dtype != torch.float32:  # the LSE is fp32 whatever the inputs are, so it is measured by fp32
        with torch.no_grad():
            fp32 = inputs.to(torch.float32)
            plain["lse"] = plain_attention(fp32, fp32.q, fp32.k, fp32.v)[1]
    for name, want in truth.items():
        value = got[name]
        assert value.dtype == (torch.float32 if name == "lse" else dtype), name
        assert value.is_contiguous(), name
        assert_same_infinities(value, want, name)
        finite = want.isfinite()
        want = want[finite].double()
        if want.numel() == 0:
            continue
        error, allowed = ((x[name][finite].double() - want).abs().max().item() for x in (got, plain))
        # One unit in the last place of the largest number: plain PyTorch may be exact where a row sees one key.
        floor = ROUNDINGS[value.dtype] * torch.finfo(value.dtype).eps * max(1.0, want.abs().max().item())
        assert error <= 2 * allowed + floor, f"{name} is off by {error:.2e}, plain PyTorch by {allowed:.2e}"
    blind = got["lse"] == -INF
    assert (got["out"].transpose(-2, -3)[blind] == 0).all(), "a row that sees nothing has output"
    if gradients:
        assert (got["dq"].transpose(-2, -3)[blind] == 0).all(), "a row that sees nothing has a gradient"


def check_nan_query(backend: str, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """A NaN that comes in is not taken for a row that sees nothing: output, LSE and gradient of its row are NaN."""
    q, k, v = (torch.randn(1, 100, 1, head_dim, dtype=dtype, device=device) for _ in range(3))
    q[0, 40] = float("nan")
    q.requires_grad_()
    out, lse = longgen_attn_func(q, k, v, AttentionPattern.sink_window(4, 20), return_lse=True, backend=backend)
    rows = torch.arange(100, device=device) == 40
    assert torch.equal(out[0, :, 0].isnan().all(-1), rows)
    assert torch.equal(out[0, :, 0].isnan().any(-1), rows)
    assert torch.equal(lse[0, 0].isnan(), rows)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(dq[0, :, 0].isnan().all(-1), rows)
