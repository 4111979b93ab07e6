"""Which activations the backward pass computes again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from longgen_kernels.patterns import AttentionPattern, decode_pattern

_OURS = torch.ops.longgen_kernels.attn_fwd.default
_SDPA = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")
]


def recompute_activations(model: nn.Module, on: bool = True, keep_attention: bool = False) -> None:
    """Let a transformers model, or its peft wrapper, keep no more of a layer than its input; or everything again.

    With `keep_attention` also the output of causal attention to all keys, hidden_size numbers a token and full layer:
    at great lengths nothing is as expensive to compute again. A sparse layer's attention costs little.
    """
    what = "enable" if on else "disable"
    # transformers 5.23 warns of the second name; 5.17 has no other.
    names = [f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient")]
    switch = next(getattr(model, name) for name in names if hasattr(model, name))
    if not on:
        switch()
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    switch(how)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_dense_attention(op, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_dense_attention(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if op is not _OURS and op not in _SDPA:
        return False
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    if op is _OURS:
        pattern = decode_pattern(given["pattern"], given["mask_rows"], given["mask_cols"])
        return isinstance(pattern, AttentionPattern) and pattern.is_dense
    return bool(given.get("is_causal", False))  # a sparse layer's pattern is a mask there
