"""Activations that the backward pass computes again, under both names that transformers has had for it."""

from __future__ import annotations

from torch import nn


def recompute_activations(model: nn.Module, on: bool = True) -> None:
    """Let a transformers model, or its peft wrapper, keep no more of a layer than its input; or everything again."""
    what = "enable" if on else "disable"
    # transformers 5.23 warns of the second name; 5.17 has no other.
    names = [f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient")]
    switch = next(getattr(model, name) for name in names if hasattr(model, name))
    switch(*([{"use_reentrant": False}] if on else []))
