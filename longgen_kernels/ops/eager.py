"""When an operator's work can be done without the dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether nobody could tell a call of an operator from what it does being done directly.

    True in eager mode, with ordinary tensors and nothing that traces, transforms or intercepts operators. It spares
    short calls the dispatcher, which is a good part of their host time.
    """
    return (
        all(type(x) is Tensor for x in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )
