"""Attention kernels of other packages, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longgen_kernels.benchmark.cases import Case, Inputs
from longgen_kernels.benchmark.prepared import Prepared


def why_not_installed(module: str, device: torch.device) -> str | None:
    """None if a package for GPUs can be used on the device, otherwise the reason."""
    if device.type != "cuda":
        return f"needs a GPU, this is {device.type}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return f"{module} is not installed"
        return f"{module} does not import: {one_line(error)}"
    except Exception as error:  # a build for another torch fails in many ways; each is the reason
        return f"{module} does not import: {one_line(error)}"
    return None


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


class FlashAttn:
    """flash-attn 2, 3 or 4: dense causal attention and sliding windows."""

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self._module = module

    def available(self, device: torch.device) -> str | None:
        return why_not_installed(self._module, device)

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        pattern = case.pattern
        expressible = pattern.is_causal and not (pattern.sink or pattern.stride or pattern.window_blocks)
        return None if expressible else "dense causal attention and token windows without a sink only"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        flash_attn_func: Any = importlib.import_module(self._module).flash_attn_func
        window = case.pattern.window
        # flash-attn counts the keys to the left of the query, without its own.
        options = {} if window is None else {"window_size": (window - 1, 0)}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flash_attn_func(q, k, v, causal=True, **options)
            out: Tensor = result[0] if isinstance(result, tuple) else result  # some releases return the LSE too
            return out

        return Prepared(attend, inputs)


class BlockSparseAttn:
    """Block-Sparse-Attention: dense causal attention, sinks with windows of tokens or of 128-token blocks.

    Its windows of tokens have no backward pass.
    """

    name = "block_sparse_attn"
    _BLOCK = 128

    def available(self, device: torch.device) -> str | None:
        return why_not_installed(self.name, device)

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        pattern = case.pattern
        if not pattern.is_causal or pattern.stride:
            return "causal attention without strided blocks only"
        if pattern.window_blocks is not None and (pattern.block_size != self._BLOCK or pattern.sink % self._BLOCK):
            return f"blocks of {self._BLOCK} tokens only"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        package: Any = importlib.import_module(self.name)
        pattern, n, heads, device = case.pattern, case.seqlen, case.q_heads, inputs.q.device
        bounds = torch.arange(0, (case.batch + 1) * n, n, dtype=torch.int32, device=device)
        kinds = torch.full((heads,), 0 if pattern.is_dense else -1, dtype=torch.int32, device=device)  # -1: streaming

        def of_each_head(sink: int, window: int) -> Tensor:
            return torch.tensor([sink, window] * heads, dtype=torch.int32, device=device)

        function: Callable[..., Tensor]
        options: tuple[Any, ...]
        if pattern.is_dense:
            function, options = package.block_sparse_attn_func, (of_each_head(0, 0), None, n, n, 0.0, False, None, True)
        elif pattern.window is not None:
            function, options = package.token_streaming_attn_func, (of_each_head(pattern.sink, pattern.window), n, n)
        else:
            blocks = of_each_head(pattern.sink // self._BLOCK, pattern.window_blocks or 0)
            function, options = package.block_streaming_attn_func, (blocks, n, n, 0.0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            packed = (x.flatten(0, 1) for x in (q, k, v))
            out = function(*packed, bounds, bounds, kinds, *options)
            return out.view(q.shape)

        return Prepared(attend, inputs)
