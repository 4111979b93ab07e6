"""What is measured: this package's backends and the attention kernels that can be imported beside them.

A peer names itself, says whether it is there (`available`) and whether it can express a case (`unsupported`), and turns
a case into calls (`prepare`). Tensors in and out are (batch, seqlen, heads, head_dim), as flash-attn has them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longgen_kernels import AttentionPattern, explain_attention, longgen_attn_func
from longgen_kernels.benchmark.cases import Case, Inputs
from longgen_kernels.benchmark.flex import Flex
from longgen_kernels.benchmark.packages import BlockSparseAttn, FlashAttn
from longgen_kernels.benchmark.prepared import Prepared


class Peer(Protocol):
    """One contender."""

    name: str

    def available(self, device: torch.device) -> str | None:
        """None if it can be imported and runs on the device, otherwise the reason."""

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        """None if it can express the case, otherwise the reason."""

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """The calls to be timed, with everything done that a user does once per shape."""


class Ours:
    """One backend of this package, through the public function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def available(self, device: torch.device) -> str | None:
        if os.environ.get("TRITON_INTERPRET") == "1" and self.name == "triton":
            return "Triton's interpreter is not worth timing"
        return self._why_not(Case("causal", AttentionPattern.causal(), 1), device)

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        return self._why_not(case, device)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = longgen_attn_func(q, k, v, case.pattern, backend=self.name)
            assert isinstance(out, Tensor)
            return out

        return Prepared(attend, inputs)

    def _why_not(self, case: Case, device: torch.device) -> str | None:
        q = torch.empty(1, 1, case.q_heads, case.head_dim, dtype=case.dtype, device=device)
        k = torch.empty(1, 1, case.kv_heads, case.head_dim, dtype=case.dtype, device=device)
        return explain_attention(q, k, k, case.pattern)[self.name]


class Sdpa:
    """One backend of PyTorch's scaled_dot_product_attention; dense causal attention only."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name = name
        self._backend = backend

    def available(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"needs a GPU, this is {device.type}"

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        return None if case.pattern == AttentionPattern.causal() else "dense causal attention only"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(self._backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.group > 1)

        return Prepared(attend, inputs, heads_first=True)


def all_peers() -> dict[str, Peer]:
    """Every contender by name, ours first."""
    peers: Sequence[Peer] = (
        Ours("cuda"),
        Ours("triton"),
        Ours("reference"),
        Flex("flex", mask="block arithmetic"),
        Flex("flex_create_mask", mask="create_block_mask"),
        Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("fa2_sdpa", SDPBackend.FLASH_ATTENTION),
        FlashAttn("flash_attn", "flash_attn"),
        FlashAttn("fa3", "flash_attn_interface"),
        FlashAttn("fa4", "flash_attn.cute"),
        BlockSparseAttn(),
    )
    return {peer.name: peer for peer in peers}
