"""Sparse attention for long-context training and inference."""

from longgen_kernels.attention import explain_attention, longgen_attn_func, longgen_attn_varlen_func
from longgen_kernels.patterns import AttentionPattern, BlockMask, pattern_from_dict

__all__ = [
    "AttentionPattern",
    "BlockMask",
    "explain_attention",
    "longgen_attn_func",
    "longgen_attn_varlen_func",
    "pattern_from_dict",
]
