"""What attends to what: the arithmetic `AttentionPattern` and the explicit `BlockMask`."""

from longgen_kernels.patterns.arithmetic import AttentionPattern
from longgen_kernels.patterns.base import MAX_POSITION, Pattern
from longgen_kernels.patterns.block_mask import BlockMask
from longgen_kernels.patterns.codec import decode_pattern, pattern_from_dict

__all__ = [
    "MAX_POSITION",
    "AttentionPattern",
    "BlockMask",
    "Pattern",
    "decode_pattern",
    "pattern_from_dict",
]
