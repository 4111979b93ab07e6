"""PyTorch's FlexAttention, compiled: the one widely installed peer that can express every pattern."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longgen_kernels import AttentionPattern
from longgen_kernels.benchmark.cases import Case, Inputs
from longgen_kernels.benchmark.prepared import Prepared
from longgen_kernels.benchmark.timing import synchronize

BLOCK = 128  # FlexAttention's default
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Flex:
    """FlexAttention with one of two ways to build its mask; the kernels, and so their times, are the same.

    "create_block_mask" is what a user calls, compiled; at 128K tokens it takes minutes the first time. "block
    arithmetic" computes the same block lists from the pattern much faster, so that a whole run fits into minutes.
    """

    def __init__(self, name: str, mask: str) -> None:
        self.name = name
        self._mask = mask

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"needs a GPU, this is {device.type}"

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        # Each case is compiled on its own: no recompilation limit is reached, and no kernel for dynamic shapes is used.
        torch._dynamo.reset()
        _allow_retained_graphs()
        device = inputs.q.device
        synchronize(device)
        start = time.perf_counter()
        if self._mask == "create_block_mask":
            heads = case.q_heads if case.pattern.head_phase_step else None
            n = case.seqlen
            mask = create_block_mask(mask_mod(case), None, heads, n, n, device, BLOCK, _compile=True)
        else:
            mask = block_mask(case, device)
        synchronize(device)
        setup = {"mask_s": time.perf_counter() - start}
        compiled: Any = torch.compile(flex_attention, dynamic=False)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=case.group > 1)
            return out

        return Prepared(attend, _heads_first_in_memory(inputs), heads_first=True, setup=setup)


def mask_mod(case: Case) -> MaskMod:
    """The pattern as FlexAttention's predicate on (batch, query head, query, key)."""
    pattern, group = case.pattern, case.group

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return pattern.is_visible(q_idx, kv_idx, h // group if group > 1 else h)

    return visible


def block_mask(case: Case, device: torch.device) -> BlockMask:
    """The BlockMask that `create_block_mask` builds, without evaluating every pair.

    A key is seen by one run of queries: from itself to its end (see `last_query_end`). So the visible pairs of a block
    are a sum over its keys, and a block is full, partial or empty by their number.
    """
    pattern, n = case.pattern, case.seqlen
    blocks = -(-n // BLOCK)
    keys = torch.arange(n, device=device)
    first_row = torch.arange(blocks, device=device)[:, None] * BLOCK
    last_row = (first_row + BLOCK).clamp(max=n)
    partial, full = [], []
    for head in range(case.kv_heads if pattern.head_phase_step else 1):
        seen = torch.minimum(last_query_end(pattern, keys, head), last_row) - torch.maximum(keys, first_row)
        seen = torch.nn.functional.pad(seen.clamp_(min=0), (0, blocks * BLOCK - n))
        pairs = seen.view(blocks, blocks, BLOCK).sum(-1)
        full.append(pairs == BLOCK * BLOCK)
        partial.append((pairs > 0) & (pairs < BLOCK * BLOCK))
    group = case.group if pattern.head_phase_step else 1
    partial_lists, full_lists = (_ordered(torch.stack(x)[None].repeat_interleave(group, 1)) for x in (partial, full))
    return BlockMask.from_kv_blocks(*partial_lists, *full_lists, BLOCK, mask_mod(case), (n, n))


def last_query_end(pattern: AttentionPattern, keys: Tensor, kv_head: int) -> Tensor:
    """One past the last query position that sees each key."""
    forever = torch.full_like(keys, 1 << 40)
    if pattern.is_dense:
        return forever
    block_size = pattern.block_size or 1
    if pattern.window is not None:
        end = keys + pattern.window
    else:
        end = (keys // block_size + (pattern.window_blocks or 0)) * block_size
    permanent = keys < pattern.sink
    if pattern.stride is not None:
        permanent = permanent | ((keys // block_size + pattern.phase(kv_head)) % pattern.stride == 0)
    return torch.where(permanent, forever, end)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Block counts of each row, and the row's block indices followed by the rest: FlexAttention's own format."""
    wanted = dense.to(torch.int32)
    order = torch.argsort(wanted, dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _heads_first_in_memory(inputs: Inputs) -> Inputs:
    """The same inputs with (batch, heads, seqlen, head_dim) contiguous in memory, the layout FlexAttention is given."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
    return Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors))


def _allow_retained_graphs() -> None:
    """A compiled backward otherwise overwrites what the forward saved, and refuses to run twice on one graph."""
    import torch._functorch.config as config

    config.donated_buffer = False
