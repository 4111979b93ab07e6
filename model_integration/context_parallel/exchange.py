"""The one collective of context parallelism: rows change ranks, and their gradients go back."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor


def exchange_rows(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows; differentiable, and collective: every rank of the group calls it, and backward through it.

    Args:
        rows: (sum(send), ...), those for rank 0 first.
        send, receive: how many rows go to, and come from, each rank.

    Returns: (sum(receive), ...), those of rank 0 first.
    """
    received = collectives.all_to_all_single_autograd(rows.contiguous(), list(receive), list(send), group)
    return collectives.wait_tensor(received)
