"""PyTorch in fp32: the CPU backend and the oracle that every kernel is tested against."""

from longgen_kernels.kernels.reference.attention import attention_unsupported, attn_bwd, attn_fwd
from longgen_kernels.kernels.reference.cache import (
    cache_append,
    cache_attention_unsupported,
    cache_attn,
    cache_unsupported,
)

backward_unsupported = attention_unsupported

__all__ = [
    "attention_unsupported",
    "attn_bwd",
    "attn_fwd",
    "backward_unsupported",
    "cache_append",
    "cache_attention_unsupported",
    "cache_attn",
    "cache_unsupported",
]
