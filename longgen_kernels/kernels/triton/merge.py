"""Merging attention states in Triton: one program takes a block of tokens of one head."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048  # of one tensor in one program: 16 a thread, two 16-byte loads of a 16-bit type
# What changes with the length must not select another specialisation, or each new length would compile again.
_PER_LENGTH = ["seqlen", *(f"lse_{x}_{s}" for x in "ab" for s in ("sb", "sh", "ss"))]
_PER_LENGTH_BWD = [*_PER_LENGTH, "dlse_sb", "dlse_sh", "dlse_ss"]


def merge_unsupported(out_a: Tensor) -> str | None:
    """None if the kernels can merge states like `out_a`, otherwise the reason."""
    if out_a.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"has no kernel for {out_a.dtype}"
    return None


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `longgen_kernels.merge_attn_states`; outputs (B, S, H, D) and LSE (B, H, S) of any strides."""
    out_a, out_b = _unit_last_stride(out_a), _unit_last_stride(out_b)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    _launch(_merge_kernel, out_a, out_a, lse_a, out_b, lse_b, out, lse, *_strides(out_a, lse_a, out_b, lse_b))
    return out, lse


def merge_attn_states_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dout_a, dlse_a, dout_b, dlse_b), contiguous."""
    # Autograd hands over expanded gradients, whose last stride is 0.
    dout, out_a, out_b = (_unit_last_stride(x) for x in (dout, out_a, out_b))
    dout_a, dout_b = (torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device) for _ in range(2))
    dlse_a, dlse_b = (torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device) for _ in range(2))
    inputs = (dout, dlse, out_a, lse_a, out_b, lse_b)
    _launch(_merge_bwd_kernel, out_a, *inputs, dout_a, dlse_a, dout_b, dlse_b, *_strides(*inputs))
    return dout_a, dlse_a, dout_b, dlse_b


def _launch(kernel: Any, out: Tensor, *args: Any) -> None:
    batch, seqlen, heads, head_dim = out.shape
    if out.numel() == 0:
        return
    block_d = triton.next_power_of_2(head_dim)
    block_s = max(1, _ELEMENTS // block_d)
    grid = (batch * triton.cdiv(seqlen, block_s) * heads,)
    # Triton launches on the current device, which need not be the tensors'.
    device = torch.cuda.device(out.device) if out.device.type == "cuda" else contextlib.nullcontext()
    with device:
        kernel[grid](*args, seqlen, heads, HEAD_DIM=head_dim, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=4)


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@triton.jit
def _merge_lse(lse_a, lse_b):
    """exp(lse_a - lse), exp(lse_b - lse) and lse = log(exp(lse_a) + exp(lse_b)), through the difference of the two."""
    difference = tl.where(lse_a == lse_b, 0.0, lse_a - lse_b)  # -inf - -inf would be NaN
    ratio = tl.exp(-tl.abs(difference))
    larger = 1.0 / (1.0 + ratio)
    smaller = ratio * larger
    weight_a = tl.where(lse_a == float("-inf"), 0.0, tl.where(difference >= 0, larger, smaller))
    weight_b = tl.where(lse_b == float("-inf"), 0.0, tl.where(difference >= 0, smaller, larger))
    return weight_a, weight_b, tl.maximum(lse_a, lse_b) + tl.log(1.0 + ratio)


@triton.jit
def _weighted(weight, x):
    """A state of weight zero saw nothing, and may hold anything, NaN included: it is left out, not multiplied by 0."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _rows(seqlen, heads, BLOCK_S: tl.constexpr):
    """The batch, tokens and head of this program. Heads vary fastest: they are neighbours in memory. 64-bit, because
    strides multiply them."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen, BLOCK_S)
    head = pid % heads
    block = pid // heads % blocks
    batch = pid // heads // blocks
    tokens = block.to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    return batch.to(tl.int64), tokens, head.to(tl.int64)


@triton.jit(do_not_specialize=_PER_LENGTH)
def _merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    out_a_sb, out_a_ss, out_a_sh, lse_a_sb, lse_a_sh, lse_a_ss,
    out_b_sb, out_b_ss, out_b_sh, lse_b_sb, lse_b_sh, lse_b_ss,
    seqlen, heads, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, s, h = _rows(seqlen, heads, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    exists = s < seqlen
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]

    value_a = tl.load(lse_a + b * lse_a_sb + h * lse_a_sh + s * lse_a_ss, mask=exists, other=0.0)
    value_b = tl.load(lse_b + b * lse_b_sb + h * lse_b_sh + s * lse_b_ss, mask=exists, other=0.0)
    weight_a, weight_b, merged = _merge_lse(value_a, value_b)
    tl.store(lse + (b * heads + h) * seqlen + s, merged, mask=exists)

    row_a = (b * out_a_sb + h * out_a_sh + s * out_a_ss)[:, None] + d[None, :]
    row_b = (b * out_b_sb + h * out_b_sh + s * out_b_ss)[:, None] + d[None, :]
    x_a = tl.load(out_a + row_a, mask=mask, other=0.0).to(tl.float32)
    x_b = tl.load(out_b + row_b, mask=mask, other=0.0).to(tl.float32)
    total = _weighted(weight_a[:, None], x_a) + _weighted(weight_b[:, None], x_b)
    row = (((b * seqlen + s) * heads + h) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(out + row, total.to(out.dtype.element_ty), mask=mask)


# With w_a + w_b = 1:  dlse_a = w_a * (dlse + dout . (out_a - out)),  out_a - out = w_b * (out_a - out_b).
@triton.jit(do_not_specialize=_PER_LENGTH_BWD)
def _merge_bwd_kernel(
    dout, dlse, out_a, lse_a, out_b, lse_b, dout_a, dlse_a, dout_b, dlse_b,
    dout_sb, dout_ss, dout_sh, dlse_sb, dlse_sh, dlse_ss,
    out_a_sb, out_a_ss, out_a_sh, lse_a_sb, lse_a_sh, lse_a_ss,
    out_b_sb, out_b_ss, out_b_sh, lse_b_sb, lse_b_sh, lse_b_ss,
    seqlen, heads, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, s, h = _rows(seqlen, heads, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    exists = s < seqlen
    mask = exists[:, None] & (d < HEAD_DIM)[None, :]

    value_a = tl.load(lse_a + b * lse_a_sb + h * lse_a_sh + s * lse_a_ss, mask=exists, other=0.0)
    value_b = tl.load(lse_b + b * lse_b_sb + h * lse_b_sh + s * lse_b_ss, mask=exists, other=0.0)
    weight_a, weight_b, _ = _merge_lse(value_a, value_b)
    w_a, w_b = weight_a[:, None], weight_b[:, None]

    row_a = (b * out_a_sb + h * out_a_sh + s * out_a_ss)[:, None] + d[None, :]
    row_b = (b * out_b_sb + h * out_b_sh + s * out_b_ss)[:, None] + d[None, :]
    row_d = (b * dout_sb + h * dout_sh + s * dout_ss)[:, None] + d[None, :]
    x_a = tl.load(out_a + row_a, mask=mask, other=0.0).to(tl.float32)
    x_b = tl.load(out_b + row_b, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dout + row_d, mask=mask, other=0.0).to(tl.float32)
    difference = tl.where(w_a == 0.0, 0.0, x_a) - tl.where(w_b == 0.0, 0.0, x_b)
    dot = tl.sum(grad * difference, axis=1)

    row = (((b * seqlen + s) * heads + h) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(dout_a + row, _weighted(w_a, grad).to(dout_a.dtype.element_ty), mask=mask)
    tl.store(dout_b + row, _weighted(w_b, grad).to(dout_b.dtype.element_ty), mask=mask)
    grad_lse = tl.load(dlse + b * dlse_sb + h * dlse_sh + s * dlse_ss, mask=exists, other=0.0)
    lse_row = (b * heads + h) * seqlen + s
    tl.store(dlse_a + lse_row, _weighted(weight_a, grad_lse + weight_b * dot), mask=exists)
    tl.store(dlse_b + lse_row, _weighted(weight_b, grad_lse - weight_a * dot), mask=exists)
