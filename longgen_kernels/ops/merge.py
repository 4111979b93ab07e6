"""The operators `torch.ops.longgen_kernels.merge_attn_states` and `merge_attn_states_bwd`.

Functional, with fake implementations and autograd. The backend is a string argument that is resolved when the operator
runs, so that torch.compile traces one operator, whichever backend that will be.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longgen_kernels import dispatch

__all__ = ["SUPPORT"]

lib = torch.library.Library("longgen_kernels", "FRAGMENT")
_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
lib.define(f"merge_attn_states({_STATES}, str backend) -> (Tensor, Tensor)")
lib.define(
    f"merge_attn_states_bwd(Tensor dout, Tensor dlse, {_STATES}, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _backend(name: str) -> Any:
    # Imported when first used: a machine without Triton has the reference all the same.
    return importlib.import_module(f"longgen_kernels.kernels.{name}.merge")


def _unsupported(name: str, out_a: Tensor) -> str | None:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    reason: str | None = _backend(name).merge_unsupported(out_a)
    return reason


SUPPORT = {name: partial(_unsupported, name) for name in dispatch.BACKENDS}


def _choose(requested: str, out_a: Tensor) -> Any:
    return _backend(dispatch.choose(requested, SUPPORT, out_a, "merge_attn_states", out_a.device.type))


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = _choose(backend, out_a).merge_attn_states(out_a, lse_a, out_b, lse_b)
    return out, lse


def _merge_bwd(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout_a, dlse_a, dout_b, dlse_b = _choose(backend, out_a).merge_attn_states_bwd(
        dout, dlse, out_a, lse_a, out_b, lse_b
    )
    return dout_a, dlse_a, dout_b, dlse_b


def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _merge_bwd_fake(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (x.new_empty(x.shape) for x in (out_a, lse_a, out_b, lse_b))
    return next(grads), next(grads), next(grads), next(grads)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *states, ctx.backend = inputs
    ctx.save_for_backward(*states)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.longgen_kernels.merge_attn_states_bwd(dout, dlse, *ctx.saved_tensors, ctx.backend)
    return (*grads, None)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("merge_attn_states has no second derivative")


def _register(name: str, impl: Any, fake: Any, backward: Any, setup: Any) -> None:
    lib.impl(name, impl, "CompositeExplicitAutograd")  # every device: the backend says which it runs on
    torch.library.register_fake(f"longgen_kernels::{name}", fake, lib=lib)
    torch.library.register_autograd(f"longgen_kernels::{name}", backward, setup_context=setup, lib=lib)


_register("merge_attn_states", _merge, _merge_fake, _backward, _save_for_backward)
_register("merge_attn_states_bwd", _merge_bwd, _merge_bwd_fake, _no_double_backward, lambda ctx, inputs, output: None)
