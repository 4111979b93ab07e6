"""Forward kernel: one program per query tile and head, one loop over the tile's key tiles."""

import triton
import triton.language as tl

from longgen_kernels.kernels.triton.iterate import (
    ceil_div,
    gather_offsets,
    key_tile,
    query_tile,
    sequence_of,
    visible_tile,
)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "q_start", "k_start", "batch", "lse_sb", "lse_sh",
    "sink", "window", "stride", "log2_block", "phase_step", "phase_offset",
    "mask_entries", "mask_group", "mask_rows_per_head",
])  # fmt: skip
def attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q, cu_k, q_starts, k_starts, mask_rows,
    q_sb: tl.int64, q_ss: tl.int64, q_sh: tl.int64,
    k_sb: tl.int64, k_ss: tl.int64, k_sh: tl.int64,
    v_sb: tl.int64, v_ss: tl.int64, v_sh: tl.int64,
    o_sb: tl.int64, o_ss: tl.int64, o_sh: tl.int64,
    lse_sb: tl.int64, lse_sh: tl.int64,
    seqlen_q: tl.int32, seqlen_k: tl.int32, q_start: tl.int32, k_start: tl.int32,
    batch: tl.int32, scale_log2,
    sink: tl.int32, window: tl.int32, stride: tl.int32, log2_block: tl.int32,
    phase_step: tl.int32, phase_offset: tl.int32,
    mask_entries: tl.int32, mask_group: tl.int32, mask_rows_per_head: tl.int32,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
    GATHER: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * Q K^T, masked) V and its LSE; grid (query tiles, q_heads, batch or 1).

    q, out (batch, seqlen_q, q_heads, HEAD_DIM), k, v (batch, seqlen_k, kv_heads, HEAD_DIM), lse (batch, q_heads,
    seqlen_q); packed without the batch. Strides are in elements.
    """
    head = tl.program_id(1)
    kv_head = head // GROUP
    seq = tl.program_id(2)
    seq64 = seq.to(tl.int64)
    # The last tiles of a causal pattern are its longest: they go first.
    tile, q_first, q_len, k_first, k_len, q_start, k_start = sequence_of(
        tl.num_programs(0) - 1 - tl.program_id(0), BLOCK_M, 2, seqlen_q, seqlen_k, q_start, k_start,
        cu_q, cu_k, q_starts, k_starts, batch, True, VARLEN, HAS_Q_STARTS, HAS_K_STARTS,
    )  # fmt: skip
    (
        p_tile, p_first, p_last, head_phase,
        n_sink, n_window, sink_tile, window_tile, rank, n_columns, strided_lo, strided_hi,
    ) = query_tile(
        tile, head, kv_head, q_start, q_len, k_start, k_len, mask_group, mask_rows_per_head,
        phase_step, phase_offset, sink, window, stride, log2_block, mask_rows,
        BLOCK_M, BLOCK_N, BLOCK_MASK, CAUSAL, WINDOW, STRIDED,
    )  # fmt: skip
    if p_last < p_first:
        return
    p = p_tile + tl.arange(0, BLOCK_M)
    rows = p - q_start
    row_ok = (rows >= 0) & (rows < q_len)
    k_end = k_start + k_len
    n_strided = ceil_div(n_columns, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    q_rows = q_first + rows.to(tl.int64)
    q = tl.load(
        q_ptr + seq64 * q_sb + head * q_sh + q_rows[:, None] * q_ss + d[None, :],
        mask=row_ok[:, None] & d_ok[None, :], other=0.0,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    gathered_columns = columns
    if GATHER:
        gathered_columns = gather_offsets(columns, stride, log2_block)
    # Position `x` lies at k_base + x * k_ss.
    if not TMA:
        k_base = k_ptr + seq64 * k_sb + kv_head * k_sh + (k_first - k_start).to(tl.int64) * k_ss + d[None, :]
        v_base = v_ptr + seq64 * v_sb + kv_head * v_sh + (k_first - k_start).to(tl.int64) * v_ss + d[None, :]

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, n_sink + n_strided + n_window, num_stages=STAGES):
        base, gathered, masked, run_lo, run_hi = key_tile(
            i, p_first, p_last, k_start, k_end, head_phase, n_sink, n_strided, sink_tile, window_tile, rank,
            n_columns, strided_lo, strided_hi, sink, window, stride, log2_block, mask_rows, mask_entries,
            BLOCK_N, BLOCK_MASK, CAUSAL, WINDOW, STRIDED,
        )  # fmt: skip
        j = base + columns
        if GATHER:
            j = base + tl.where(gathered, gathered_columns, columns)
        if TMA:
            k = k_ptr.load([seq, kv_head, base - k_start, 0]).reshape(BLOCK_N, BLOCK_D)
            v = v_ptr.load([seq, kv_head, base - k_start, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            j_ok = (j >= k_start) & (j < k_end)
            kv_ok = j_ok[:, None] & d_ok[None, :]
            k = tl.load(k_base + j.to(tl.int64)[:, None] * k_ss, mask=kv_ok, other=0.0)
            v = tl.load(v_base + j.to(tl.int64)[:, None] * v_ss, mask=kv_ok, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if masked:
            seen = visible_tile(
                p[:, None], j[None, :], base, run_lo, run_hi, head_phase, sink, window, stride, log2_block,
                CAUSAL, WINDOW, STRIDED, GATHER,
            )  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        # A row that has seen nothing yet keeps m = -inf; 0 in its place makes its weights exp2(-inf) = 0.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        w = tl.exp2(s * scale_log2 - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(w, 1)
        acc = acc * alpha[:, None]
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new

    seen_any = denom != 0.0  # NaN is not 0: it stays NaN
    out = acc / tl.where(seen_any, denom, 1.0)[:, None]
    lse = tl.where(seen_any, (m + tl.log2(tl.where(seen_any, denom, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(
        out_ptr + seq64 * o_sb + head * o_sh + q_rows[:, None] * o_ss + d[None, :], out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & d_ok[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + seq64 * lse_sb + head * lse_sh + q_rows, lse, mask=row_ok)
