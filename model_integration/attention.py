"""The attention function "longgen", and the masks that make the other implementations equally sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface

from longgen_kernels import AttentionPattern, longgen_attn_func, longgen_attn_varlen_func
from model_integration.cache import CacheStep
from model_integration.context_parallel import SequenceShard
from model_integration.layout import SequenceLayout

NAME = "longgen"

#: Implementations that take this module's masks. The flash-attention family takes none and would run dense.
IMPLEMENTATIONS = (NAME, "sdpa", "eager", "flex_attention")


def longgen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SequenceLayout | CacheStep | SequenceShard | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under `module.pattern`, in the form that transformers' AttentionInterface calls.

    Args:
        module: an attention module with a `pattern`; one without is refused, since nobody said what it sees.
        query: (batch, heads, q_length, head_dim), after RoPE.
        key, value: (batch, kv_heads, kv_length, head_dim), the cached tokens included but with a CacheStep.
        attention_mask: a SequenceLayout; or a CacheStep, in whose cache the layer's earlier keys are; or a
            SequenceShard, of which other ranks hold the rest; or a (batch, kv_length) padding mask; or None.
        cu_seq_lens_q, max_length_q: boundaries of packed sequences, read when attention_mask is None.

    Returns: output (batch, q_length, heads, head_dim), and None for the attention weights.
    """
    pattern = getattr(module, "pattern", None)
    if pattern is None:
        raise TypeError(f"{type(module).__name__} has no attention pattern: load the model as a LongGen hybrid")
    if dropout:
        raise ValueError(f"longgen attention has no dropout, got {dropout}")
    batch, _, q_length, _ = query.shape
    # Under autocast RoPE leaves q and k in fp32 while v is 16-bit.
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (query, key, value))
    if isinstance(attention_mask, CacheStep | SequenceShard):
        return attention_mask.attend(module, q, k, v, scaling), None
    layout = attention_mask
    if not isinstance(layout, SequenceLayout):
        seen = key.shape[2] - q_length
        layout = SequenceLayout.of(
            batch, q_length, seen=seen, attention_mask=layout, cu_seq_lens=cu_seq_lens_q, max_length=max_length_q
        )
    if layout.is_plain:
        return longgen_attn_func(q, k, v, pattern, softmax_scale=scaling), None

    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if layout.cu_seq_lens is not None:
        bounds, longest = layout.cu_seq_lens.to(q.device), layout.max_length
        out = longgen_attn_varlen_func(q, k, v, pattern, bounds, bounds, longest, longest, softmax_scale=scaling)
        return out.unflatten(0, (batch, q_length)), None
    real_q, real_k, cu_q, cu_k, longest_q, longest_k = layout.unpad
    out = longgen_attn_varlen_func(
        q[real_q], k[real_k], v[real_k], pattern, cu_q, cu_k, longest_q, longest_k, softmax_scale=scaling
    )
    padded = torch.zeros_like(q).index_copy(0, real_q, out)
    return padded.unflatten(0, (batch, q_length)), None


def longgen_mask(
    batch_size: int, q_length: int, kv_length: int, *, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """What transformers' own mask helpers get for "longgen": the 2-D padding mask, or None where nothing is padded.

    An implementation without a registered mask function gets None always, and padding is lost without a word.
    """
    return None if attention_mask is None or attention_mask.all() else attention_mask


def attention_mask_for(
    implementation: str, layout: SequenceLayout, pattern: AttentionPattern, heads: int, kv_heads: int, like: Tensor
) -> Any:
    """The `attention_mask` argument with which `implementation` computes `pattern` over `layout`.

    Args:
        implementation: one of IMPLEMENTATIONS.
        like: a tensor with the model's device and activation dtype.

    Returns: the layout itself for "longgen"; for "sdpa" a bool and for "eager" an additive mask of
    (batch or 1, heads or 1, q_length, kv_length), or None where SDPA's own causal mask says the same; a BlockMask for
    "flex_attention". Raises ValueError for an implementation that takes no masks.
    """
    if implementation == NAME:
        return layout
    if implementation == "flex_attention":
        return _flex_mask(layout, pattern, heads, kv_heads, like.device)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation={implementation!r} would run dense; use {', '.join(IMPLEMENTATIONS)}")
    if implementation == "sdpa" and pattern.is_dense and layout.is_plain and (layout.seen == 0 or layout.q_length == 1):
        return None
    visible = layout.visible(pattern, heads, kv_heads, like.device)
    if implementation == "sdpa":
        return visible
    # The most negative finite number, as transformers has it: under -inf a row of padding would become NaN.
    return torch.zeros((), dtype=like.dtype, device=like.device).where(visible, torch.finfo(like.dtype).min)


def _flex_mask(
    layout: SequenceLayout, pattern: AttentionPattern, heads: int, kv_heads: int, device: torch.device
) -> Any:
    """The same mask for FlexAttention. transformers' helper evaluates head 0 only, which would lose per-head phases."""
    seen, group = layout.seen, heads // kv_heads
    sequence, position = layout.sequences_and_positions(device)
    rows = sequence.shape[0]  # 1 when all are alike

    def visible_by_position(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return pattern.is_visible(q + seen, k, h // group)

    def visible_by_sequence(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if rows > 1 else 0
        inside = sequence[row, q + seen] == sequence[row, k]
        return inside & pattern.is_visible(position[row, q + seen], position[row, k], h // group)

    return create_block_mask(
        visible_by_position if layout.is_plain else visible_by_sequence,
        B=rows if rows > 1 else None,
        H=heads if pattern.head_phase_step else None,
        Q_LEN=layout.q_length,
        KV_LEN=layout.kv_length,
        device=device,
        _compile=device.type == "cuda",
    )


AttentionInterface.register(NAME, longgen_attention_forward)
AttentionMaskInterface.register(NAME, longgen_mask)
