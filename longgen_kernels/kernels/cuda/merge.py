"""Launches the CUDA kernels of csrc/merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.arguments import current_stream, on_device
from longgen_kernels.kernels.cuda.extension import available

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def merge_unsupported(out_a: Tensor) -> str | None:
    """None if the kernels can merge states like `out_a`, otherwise the reason."""
    if out_a.dtype not in _DTYPE_NAMES:
        return f"has no kernel for {out_a.dtype}"
    return available(out_a.device)


def merge_attn_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See `longgen_kernels.merge_attn_states`; outputs (B, S, H, D) and LSE (B, H, S) of any strides."""
    from longgen_kernels import _C

    out_a, out_b = _unit_last_stride(out_a), _unit_last_stride(out_b)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    with on_device(out_a):
        _C.merge_attn_states(
            **_shape(out_a),
            **_argument("out_a", out_a),
            **_argument("lse_a", lse_a),
            **_argument("out_b", out_b),
            **_argument("lse_b", lse_b),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            stream=current_stream(out_a),
        )
    return out, lse


def merge_attn_states_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dout_a, dlse_a, dout_b, dlse_b), contiguous."""
    from longgen_kernels import _C

    # Autograd hands over expanded gradients, whose last stride is 0.
    dout, out_a, out_b = (_unit_last_stride(x) for x in (dout, out_a, out_b))
    dout_a, dout_b = (torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device) for _ in range(2))
    dlse_a, dlse_b = (torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device) for _ in range(2))
    with on_device(out_a):
        _C.merge_attn_states_bwd(
            **_shape(out_a),
            **_argument("dout", dout),
            **_argument("dlse", dlse),
            **_argument("out_a", out_a),
            **_argument("lse_a", lse_a),
            **_argument("out_b", out_b),
            **_argument("lse_b", lse_b),
            dout_a=dout_a.data_ptr(),
            dlse_a=dlse_a.data_ptr(),
            dout_b=dout_b.data_ptr(),
            dlse_b=dlse_b.data_ptr(),
            stream=current_stream(out_a),
        )
    return dout_a, dlse_a, dout_b, dlse_b


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(out: Tensor) -> dict[str, Any]:
    batch, seqlen, heads, head_dim = out.shape
    dtype = _DTYPE_NAMES[out.dtype]
    return {"batch": batch, "seqlen": seqlen, "heads": heads, "head_dim": head_dim, "dtype": dtype}


def _argument(name: str, tensor: Tensor) -> dict[str, Any]:
    return {name: tensor.data_ptr(), f"{name}_strides": tensor.stride()[:3]}
