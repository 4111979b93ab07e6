"""Merging attention states in plain PyTorch: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_unsupported(out_a: Tensor) -> str | None:
    """None: PyTorch merges states of any dtype on any device."""
    return None


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `longgen_kernels.merge_attn_states`; outputs (B, S, H, D), LSE (B, H, S). Computes in fp32, fp64 for fp64."""
    weight_a, weight_b, lse = _merge_lse(lse_a, lse_b)
    w_a, w_b = _per_row(weight_a), _per_row(weight_b)
    out = _weighted(w_a, out_a.to(lse.dtype)) + _weighted(w_b, out_b.to(lse.dtype))
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def merge_attn_states_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dout_a, dlse_a, dout_b, dlse_b). With w_a + w_b = 1, `out_a - out` is `w_b (out_a - out_b)`, so that
    `dlse_a = w_a (dlse + dout . (out_a - out))` needs no `out`."""
    weight_a, weight_b, lse = _merge_lse(lse_a, lse_b)
    w_a, w_b = _per_row(weight_a), _per_row(weight_b)
    dout = dout.to(lse.dtype)
    difference = torch.where(w_a == 0, 0, out_a.to(lse.dtype)) - torch.where(w_b == 0, 0, out_b.to(lse.dtype))
    dot = (dout * difference).sum(-1).transpose(1, 2)
    dlse_a = _weighted(weight_a, dlse + weight_b * dot)
    dlse_b = _weighted(weight_b, dlse - weight_a * dot)
    dout_a, dout_b = (_weighted(w, dout).to(out_a.dtype) for w in (w_a, w_b))
    return dout_a.contiguous(), dlse_a.contiguous(), dout_b.contiguous(), dlse_b.contiguous()


def _merge_lse(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(lse_a - lse), exp(lse_b - lse) and lse = log(exp(lse_a) + exp(lse_b)), through the difference of the two."""
    difference = torch.where(lse_a == lse_b, 0, lse_a - lse_b)  # -inf - -inf would be NaN
    ratio = torch.exp(-difference.abs())
    larger = 1 / (1 + ratio)
    smaller = ratio * larger
    weight_a = torch.where(lse_a == -torch.inf, 0, torch.where(difference >= 0, larger, smaller))
    weight_b = torch.where(lse_b == -torch.inf, 0, torch.where(difference >= 0, smaller, larger))
    # max(a, b) in fmax's sense: a NaN reaches the result through `ratio`.
    return weight_a, weight_b, torch.fmax(lse_a, lse_b) + torch.log1p(ratio)


def _per_row(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).unsqueeze(-1)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """A state of weight zero saw nothing, and may hold anything, NaN included: it is left out, not multiplied by 0."""
    return torch.where(weight == 0, 0, weight * x)
