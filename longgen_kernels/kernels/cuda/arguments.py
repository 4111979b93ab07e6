"""What the Hopper attention kernels have in common: the problems that they take, and how tensors are handed over."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.kernels.cuda.extension import available, runs_on
from longgen_kernels.kernels.problem import AttentionProblem
from longgen_kernels.patterns import BlockMask

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def _not_on(device: torch.device) -> str | None:
    reason = available(device)
    if reason is not None:
        return reason
    from longgen_kernels import _C

    built = [arch for arch in _C.build_info()["cuda_archs"].split(",") if arch == "90a"]
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(built, capability):
        return f"has attention for Hopper (90a) only; this build and GPU ({capability[0]}.{capability[1]}) do not meet"
    return None


def hopper_unsupported(
    problem: AttentionProblem, *, head_dims: tuple[int, ...], smallest_mask_block: int
) -> str | None:
    """Why a Hopper kernel for these sizes does not run the problem, or None."""
    q, pattern = problem.q, problem.pattern
    reason = _not_on(q.device)
    if reason is not None:
        return reason
    if q.dtype not in DTYPE_NAMES:
        return f"takes float16 and bfloat16, got {q.dtype}"
    if problem.head_dim not in head_dims:
        return f"takes head_dim {' and '.join(map(str, head_dims))}, got {problem.head_dim}"
    if isinstance(pattern, BlockMask) and pattern.block_size < smallest_mask_block:
        return f"takes block masks of at least {smallest_mask_block}-token blocks, got {pattern.block_size}"
    for name, x in (("q", q), ("k", problem.k), ("v", problem.v)):
        if not has_aligned_rows(x):
            return f"takes {name} with rows at multiples of 16 bytes, got strides {x.stride()}"
    return None


def has_aligned_rows(x: Tensor) -> bool:
    """Whether the copy engine can read a tensor: unit last stride, the others multiples of 16 bytes."""
    if x.data_ptr() % 16 != 0:
        return False
    elements, shape = 16 // x.element_size(), x.shape
    if x.is_contiguous():
        return shape[-1] % elements == 0
    strides = x.stride()
    for n, stride in zip(shape[:-1], strides[:-1], strict=True):
        if n > 1 and (stride <= 0 or stride % elements != 0):
            return False
    return strides[-1] == 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, if it is not; that it mostly is saves microseconds."""
    return contextlib.nullcontext() if x.get_device() == torch._C._cuda_getDevice() else torch.cuda.device(x.device)


def current_stream(x: Tensor) -> int:
    """Address of the current stream of the tensor's device."""
    return int(torch._C._cuda_getCurrentRawStream(x.get_device()))


def argument(name: str, x: Tensor) -> dict[str, Any]:
    """A tensor as address and strides, for keywords."""
    return {name: x.data_ptr(), f"{name}_strides": x.stride()}


def address(x: Tensor | None) -> int:
    """Where a tensor's data lies; 0 for None."""
    return 0 if x is None else x.data_ptr()
