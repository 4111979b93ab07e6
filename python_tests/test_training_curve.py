"""A small model trains with the kernels as it does with the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import longgen_kernels
from longgen_kernels import AttentionPattern, longgen_attn_func
from longgen_kernels.kernels import cuda

STEPS, SEQLEN, BATCH, HEADS, KV_HEADS, HEAD_DIM = 200, 512, 4, 4, 2, 128
PATTERNS = (
    AttentionPattern.causal(),
    AttentionPattern.sink_window(16, 100),
    AttentionPattern.strided(4, 16, window=64),
)


class Layer(nn.Module):
    def __init__(self, pattern: AttentionPattern, backend: str) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.pattern, self.backend = pattern, backend
        self.norm, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        x = x + self.out(longgen_attn_func(q, k, v, self.pattern, backend=self.backend).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def losses(backend: str) -> Tensor:
    """Of each step, training on this package's own source text, byte by byte."""
    torch.manual_seed(0)
    source = b"".join(path.read_bytes() for path in sorted(Path(longgen_kernels.__file__).parent.rglob("*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).cuda().long()
    layers = [Layer(pattern, backend) for pattern in PATTERNS]
    width = HEADS * HEAD_DIM
    model = nn.Sequential(nn.Embedding(256, width), *layers, nn.RMSNorm(width), nn.Linear(width, 256)).cuda().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    found = []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - SEQLEN, (BATCH,)).tolist()
        batch = torch.stack([text[start : start + SEQLEN + 1] for start in starts])
        loss = cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).cpu()


@pytest.mark.gpu
def test_the_loss_follows_the_reference() -> None:
    """Over 200 steps as closely as one run with the kernels, which add up dQ in any order, follows another."""
    if cuda.available() is not None:
        pytest.skip(str(cuda.available()))
    want, got, again = losses("reference"), losses("cuda"), losses("cuda")
    assert want[-20:].mean() < 0.75 * want[:20].mean(), "it learns"

    def apart(a: Tensor, b: Tensor) -> float:
        """The difference of the curves' means over ten steps: single steps are noise."""
        return (a - b).view(-1, 10).mean(1).abs().max().item()

    noise = apart(got, again)
    print(f"apart: reference {apart(got, want):.4f}, another run {noise:.4f}; last loss {want[-10:].mean():.3f}")
    assert apart(got, want) <= max(3 * noise, 0.03)
