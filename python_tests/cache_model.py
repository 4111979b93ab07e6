"""A KV cache that keeps everything and masks: what `SparseKVCache` is held to, and patterns to try it with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import BIG, A
from torch import Tensor

from longgen_kernels import AttentionPattern, longgen_attn_func

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
BLOCK = 16
# Units in the last place that sums of some hundred terms differ by in another order; weights are rounded in 16 bits.
ROUNDINGS = {HALF: 4, BF16: 4, FP32: 64}

PATTERNS: dict[str, AttentionPattern] = {
    "causal": A.causal(),
    "sliding window": A.sink_window(0, 19),
    "sink and window": A.sink_window(5, 37),
    "sink of more than a granule": A.sink_window(41, 16),
    "sink without a window": A.sink_window(24, 0),
    "window of the token itself": A.sink_window(0, 1),
    "window of blocks": A.sink_window(3, window_blocks=2, block_size=BLOCK),
    "window of no blocks": A.strided(2, BLOCK, window_blocks=0, head_phase_step=0),
    "nothing is visible": A.sink_window(0, 0),
    "strided blocks": A.strided(3, BLOCK, window=37, sink=4, head_phase_step=0),
    "strided blocks with per-head phases": A.strided(4, BLOCK, window=21, sink=20, head_phase_step=3),
    "strided blocks and a window of blocks": A.strided(3, BLOCK, window_blocks=2, sink=17),
    "small strided blocks": A.strided(3, 4, window=18, head_phase_offset=1),
    "strided blocks of one token": A.strided(5, 1, window=17, sink=1),
    "strided blocks larger than the window": A.strided(2, 64, window=5, sink=70, head_phase_offset=1),
    "stride of one": A.strided(1, BLOCK, window=0),
    "numbers as large as they may be": A.strided(1 << 20, 1 << 20, window=BIG - 1, sink=BIG, head_phase_step=BIG),
}


@dataclass
class Everything:
    """All keys and values that each sequence ever had: per sequence k and v (tokens, kv_heads, head_dim)."""

    pattern: AttentionPattern
    batch: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = FP32
    device: str = "cpu"
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    @property
    def lengths(self) -> list[int]:
        return [x.shape[0] for x in self.k]

    def reset(self) -> None:
        empty = torch.empty(0, self.kv_heads, self.head_dim, dtype=self.dtype, device=self.device)
        self.k, self.v = [empty] * self.batch, [empty] * self.batch

    def append(self, k: Tensor, v: Tensor, counts: list[int] | None = None) -> None:
        for b in range(self.batch):
            n = k.shape[1] if counts is None else counts[b]
            self.k[b], self.v[b] = torch.cat([self.k[b], k[b, :n]]), torch.cat([self.v[b], v[b, :n]])

    def crop(self, tokens: list[int]) -> None:
        for b, n in enumerate(tokens):
            kept = max(0, self.k[b].shape[0] - n)
            self.k[b], self.v[b] = self.k[b][:kept], self.v[b][:kept]

    def reorder(self, indices: list[int]) -> None:
        self.k, self.v = [self.k[i] for i in indices], [self.v[i] for i in indices]

    def attend(self, q: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
        """Output and LSE of q (batch, n, q_heads, head_dim), whose row 0 stands at `starts[b]`, in fp32."""
        outs, lses = [], []
        for b, start in enumerate(starts):
            # A row before position 0 sees nothing, as one at a position before every key does.
            shift = max(0, -start)
            k, v = (x[b][None].float() for x in (self.k, self.v))
            one = q[b : b + 1, shift:].float()
            out, lse = longgen_attn_func(
                one, k, v, self.pattern, return_lse=True, q_start=start + shift, backend="reference"
            )
            outs.append(torch.nn.functional.pad(out, (0, 0, 0, 0, shift, 0)))
            lses.append(torch.nn.functional.pad(lse, (shift, 0), value=-torch.inf))
        return torch.cat(outs), torch.cat(lses)


def new_tokens(model: Everything, n: int, q_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v of n tokens for each sequence."""
    return tuple(  # type: ignore[return-value]
        torch.randn(model.batch, n, heads, model.head_dim, device=model.device).to(model.dtype)
        for heads in (q_heads, model.kv_heads, model.kv_heads)
    )


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], counts: list[int] | None = None) -> None:
    """Output and LSE agree to a few roundings, and are 0 and -inf in the same rows; only `counts[b]` rows matter."""
    for b in range(got[0].shape[0]):
        n = None if counts is None else counts[b]
        out, lse, want_out, want_lse = got[0][b, :n], got[1][b, :, :n], want[0][b, :n], want[1][b, :, :n]
        assert not out.isnan().any()
        assert not lse.isnan().any()
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        assert (out.transpose(0, 1)[lse == -torch.inf] == 0).all()
        eps = ROUNDINGS[got[0].dtype] * torch.finfo(got[0].dtype).eps
        torch.testing.assert_close(out.float(), want_out, atol=eps, rtol=eps)
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-5)


def poisoned(cache: Any, poison: Any) -> Any:
    """The cache with NaN in all its memory."""
    poison(cache.k)
    poison(cache.v)
    return cache
