"""Sparse attention for long-context training and inference."""

from longgen_kernels.patterns import AttentionPattern, BlockMask, pattern_from_dict

__all__ = ["AttentionPattern", "BlockMask", "pattern_from_dict"]
