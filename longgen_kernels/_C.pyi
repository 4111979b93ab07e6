"""The compiled extension, csrc/bindings.cpp. Addresses and the stream are ints, strides count elements."""

from typing import TypedDict

class BuildInfo(TypedDict):
    cuda_archs: str
    cuda_runtime: int
    cuda_driver: int

Strides = tuple[int, int, int]

def build_info() -> BuildInfo: ...
def merge_attn_states(
    *,
    batch: int,
    seqlen: int,
    heads: int,
    head_dim: int,
    dtype: str,
    out_a: int,
    out_a_strides: Strides,
    lse_a: int,
    lse_a_strides: Strides,
    out_b: int,
    out_b_strides: Strides,
    lse_b: int,
    lse_b_strides: Strides,
    out: int,
    lse: int,
    stream: int,
) -> None: ...
def merge_attn_states_bwd(
    *,
    batch: int,
    seqlen: int,
    heads: int,
    head_dim: int,
    dtype: str,
    dout: int,
    dout_strides: Strides,
    dlse: int,
    dlse_strides: Strides,
    out_a: int,
    out_a_strides: Strides,
    lse_a: int,
    lse_a_strides: Strides,
    out_b: int,
    out_b_strides: Strides,
    lse_b: int,
    lse_b_strides: Strides,
    dout_a: int,
    dlse_a: int,
    dout_b: int,
    dlse_b: int,
    stream: int,
) -> None: ...
def attn_fwd_sm90(
    *,
    pattern: list[int],
    mask_rows: int,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    softmax_scale: float,
    q: int,
    q_strides: Strides,
    k: int,
    k_strides: Strides,
    v: int,
    v_strides: Strides,
    out: int,
    lse: int,
    q_start: int,
    k_start: int,
    cu_seqlens_q: int,
    cu_seqlens_k: int,
    q_starts: int,
    k_starts: int,
    block_table: int,
    pages: int,
    page_size: int,
    table_pages: int,
    stream: int,
) -> None: ...
