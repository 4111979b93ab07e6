"""CUDA C++ kernels. Only this package touches `data_ptr()`, strides and streams; it talks to `longgen_kernels._C`."""

from longgen_kernels.kernels.cuda.attention import attention_unsupported, attn_fwd
from longgen_kernels.kernels.cuda.backward import attn_bwd, backward_unsupported
from longgen_kernels.kernels.cuda.decode import (
    cache_append,
    cache_attention_unsupported,
    cache_attn,
    cache_unsupported,
    leaves_gpu_idle,
)
from longgen_kernels.kernels.cuda.extension import available, build_info
from longgen_kernels.kernels.cuda.merge import merge_attn_states, merge_attn_states_bwd, merge_unsupported

__all__ = [
    "attention_unsupported",
    "attn_bwd",
    "attn_fwd",
    "available",
    "backward_unsupported",
    "build_info",
    "cache_append",
    "cache_attention_unsupported",
    "cache_attn",
    "cache_unsupported",
    "leaves_gpu_idle",
    "merge_attn_states",
    "merge_attn_states_bwd",
    "merge_unsupported",
]
