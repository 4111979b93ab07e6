"""Sparse attention for long-context training and inference."""

from longgen_kernels._version import __version__
from longgen_kernels.attention import explain_attention, longgen_attn_func, longgen_attn_varlen_func
from longgen_kernels.decode import explain_kvcache_attention, longgen_attn_with_kvcache
from longgen_kernels.kv_cache import SparseKVCache, explain_append
from longgen_kernels.merge import explain_merge, merge_attn_states
from longgen_kernels.paged_kv_cache import PagedKVCache, PagePool
from longgen_kernels.patterns import AttentionPattern, BlockMask, pattern_from_dict

__all__ = [
    "AttentionPattern",
    "BlockMask",
    "PagePool",
    "PagedKVCache",
    "SparseKVCache",
    "__version__",
    "explain_append",
    "explain_attention",
    "explain_kvcache_attention",
    "explain_merge",
    "longgen_attn_func",
    "longgen_attn_varlen_func",
    "longgen_attn_with_kvcache",
    "merge_attn_states",
    "pattern_from_dict",
]
