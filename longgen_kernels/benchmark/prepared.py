"""A contender that is ready to be timed on one case."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longgen_kernels.benchmark.cases import Inputs

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Prepared:
    """The calls to be timed for one case.

    `forward` runs without autograd. `backward` runs the gradient alone, on a graph that its first call builds and
    keeps, so that a peer whose backward does not compile still has a forward. `setup` holds seconds spent beforehand.
    """

    def __init__(
        self, attend: Attend, inputs: Inputs, *, heads_first: bool = False, setup: dict[str, float] | None = None
    ) -> None:
        self._attend = attend
        self._heads_first = heads_first
        self.setup = setup or {}
        q, k, v, self._dout = (self._flip(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        self._qkv = q, k, v
        self._graph: tuple[Tensor, list[Tensor]] | None = None

    def forward(self) -> Tensor:
        """The output (batch, seqlen, q_heads, head_dim)."""
        with torch.no_grad():
            return self._flip(self._attend(*self._qkv))

    def backward(self) -> tuple[Tensor, ...]:
        """(dq, dk, dv), laid out as q, k and v."""
        if self._graph is None:
            leaves = [x.detach().requires_grad_() for x in self._qkv]
            self._graph = self._attend(*leaves), leaves
        out, leaves = self._graph
        return tuple(self._flip(x) for x in torch.autograd.grad(out, leaves, self._dout, retain_graph=True))

    def _flip(self, x: Tensor) -> Tensor:
        """To or from the peer's own order of dimensions: a view."""
        return x.transpose(1, 2) if self._heads_first else x
