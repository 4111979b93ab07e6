"""The loss of next-token prediction, without the logits of a whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: Logits that exist at once, 256 MiB in fp32: those of 2048 tokens with a vocabulary of 32K. All logits of 128K tokens
#: would take 16 GiB, and the loss would make several tensors of that size.
LOGITS_AT_ONCE = 1 << 26


@torch.compiler.disable(reason="a compiler would unroll the loop, for each length anew")
def next_token_loss(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    vocab_size: int,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss gives for `head(hidden_states)`, a stretch of tokens at a time.

    The backward pass computes each stretch's logits again, and sums the head's gradient in fp32. The head is called
    as a module, so that adapters, hooks and quantised weights in it keep their meaning.

    Args:
        hidden_states: (batch, tokens, hidden_size).
        head: gives (tokens, vocab_size) for (tokens, hidden_size).
        labels: (batch, tokens) int64; those of a row are shifted here: token i predicts label i + 1.
        num_items_in_batch: what the sum is divided by; None: the number of labels that count.
        ignore_index: the label that does not count.
        shift_labels: labels that are shifted already, instead of `labels`.

    Returns: the loss, an fp32 scalar.

    >>> hidden, head, labels = torch.randn(1, 5, 8), nn.Linear(8, 11), torch.randint(0, 11, (1, 5))
    >>> expected = F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:])
    >>> torch.testing.assert_close(next_token_loss(hidden, head, labels, vocab_size=11), expected)
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, targets = hidden_states.flatten(0, -2), shift_labels.flatten().to(hidden_states.device)
    # Each stretch has a gradient of the head's weights. In 16 bits their sum would lose a digit at 128K tokens.
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad and torch.is_grad_enabled()}
    in_fp32 = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in trained.items()}
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        weights = {name: in_fp32[name].to(autocast or p.dtype) for name, p in trained.items()}
        logits = functional_call(head, weights, (hidden,))
        return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")

    tokens = max(1, LOGITS_AT_ONCE // vocab_size)
    loss = hidden.new_zeros((), dtype=torch.float32)
    for stretch in zip(hidden.split(tokens), targets.split(tokens), strict=True):
        loss = loss + checkpoint(summed, *stretch, use_reentrant=False)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
