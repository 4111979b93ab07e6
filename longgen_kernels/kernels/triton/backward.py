"""Backward kernels: row statistics, then dQ by query tile and dK, dV by key tile.

No atomics: each gradient row is summed by one program in one order, so the result is bitwise repeatable. That costs
seven matrix products a tile where a backward with atomic dQ has five.
"""

import triton
import triton.language as tl

from longgen_kernels.kernels.triton.iterate import (
    ceil_div,
    column_tile,
    gather_offsets,
    key_tile,
    query_tile,
    sequence_of,
    visible_tile,
)


@triton.jit(do_not_specialize=[
    "rows", "pad", "lse_sb", "lse_sh", "dlse_sb", "dlse_sh", "dlse_ss", "stat_sb", "stat_sh",
])  # fmt: skip
def bwd_rows_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse_log2_ptr,
    do_sb: tl.int64, do_ss: tl.int64, do_sh: tl.int64,
    o_sb: tl.int64, o_ss: tl.int64, o_sh: tl.int64,
    lse_sb: tl.int64, lse_sh: tl.int64, dlse_sb: tl.int64, dlse_sh: tl.int64, dlse_ss: tl.int64,
    stat_sb: tl.int64, stat_sh: tl.int64, rows: tl.int32, pad: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dlse, and the LSE in base 2, +inf where a row saw nothing; grid (tiles, heads, batch).

    With +inf a row's probabilities exp2(s - lse) are 0, masked or not. `pad` such rows are put before the first.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M) - pad
    ok = (row >= 0) & (row < rows)
    head = tl.program_id(1)
    seq64 = tl.program_id(2).to(tl.int64)
    row64 = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (d < HEAD_DIM)[None, :]
    dout = tl.load(dout_ptr + seq64 * do_sb + head * do_sh + row64[:, None] * do_ss + d[None, :], mask=mask, other=0.0)
    out = tl.load(out_ptr + seq64 * o_sb + head * o_sh + row64[:, None] * o_ss + d[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + seq64 * dlse_sb + head * dlse_sh + row64 * dlse_ss, mask=ok, other=0.0)
    at = seq64 * lse_sb + head * lse_sh + row64
    lse = tl.load(lse_ptr + at, mask=ok, other=float("-inf"))
    at = seq64 * stat_sb + head * stat_sh + row64 + pad
    blind = lse == float("-inf")  # also its delta is 0: the gradient of an LSE of -inf is often NaN
    tl.store(delta_ptr + at, tl.where(blind, 0.0, delta), mask=row < rows)
    tl.store(lse_log2_ptr + at, tl.where(blind, float("inf"), lse * 1.4426950408889634), mask=row < rows)


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "q_start", "k_start", "batch", "stat_sb", "stat_sh",
    "sink", "window", "stride", "log2_block", "phase_step", "phase_offset",
    "mask_entries", "mask_group", "mask_rows_per_head",
])  # fmt: skip
def attn_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr, dq_ptr,
    cu_q, cu_k, q_starts, k_starts, mask_rows,
    q_sb: tl.int64, q_ss: tl.int64, q_sh: tl.int64,
    k_sb: tl.int64, k_ss: tl.int64, k_sh: tl.int64,
    v_sb: tl.int64, v_ss: tl.int64, v_sh: tl.int64,
    do_sb: tl.int64, do_ss: tl.int64, do_sh: tl.int64,
    dq_sb: tl.int64, dq_ss: tl.int64, dq_sh: tl.int64,
    stat_sb: tl.int64, stat_sh: tl.int64,
    seqlen_q: tl.int32, seqlen_k: tl.int32, q_start: tl.int32, k_start: tl.int32,
    batch: tl.int32, scale, scale_log2,
    sink: tl.int32, window: tl.int32, stride: tl.int32, log2_block: tl.int32,
    phase_step: tl.int32, phase_offset: tl.int32,
    mask_entries: tl.int32, mask_group: tl.int32, mask_rows_per_head: tl.int32,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
    GATHER: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ = scale * dS K with dS = P * (dO V^T - delta); grid (query tiles, q_heads, batch or 1), as the forward."""
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
    tile_ok = row_ok[:, None] & d_ok[None, :]
    q = tl.load(q_ptr + seq64 * q_sb + head * q_sh + q_rows[:, None] * q_ss + d[None, :], mask=tile_ok, other=0.0)
    dout = tl.load(
        dout_ptr + seq64 * do_sb + head * do_sh + q_rows[:, None] * do_ss + d[None, :], mask=tile_ok, other=0.0
    )
    lse_log2 = tl.load(lse_log2_ptr + seq64 * stat_sb + head * stat_sh + q_rows, mask=row_ok, other=float("inf"))
    delta = tl.load(delta_ptr + seq64 * stat_sb + head * stat_sh + q_rows, mask=row_ok, other=0.0)
    columns = tl.arange(0, BLOCK_N)
    gathered_columns = columns
    if GATHER:
        gathered_columns = gather_offsets(columns, stride, log2_block)
    if not TMA:
        k_base = k_ptr + seq64 * k_sb + kv_head * k_sh + (k_first - k_start).to(tl.int64) * k_ss + d[None, :]
        v_base = v_ptr + seq64 * v_sb + kv_head * v_sh + (k_first - k_start).to(tl.int64) * v_ss + d[None, :]

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        w = tl.exp2(s * scale_log2 - lse_log2[:, None])
        dw = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = w * (dw - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    tl.store(
        dq_ptr + seq64 * dq_sb + head * dq_sh + q_rows[:, None] * dq_ss + d[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty), mask=tile_ok,
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "seqlen_q", "seqlen_k", "q_start", "k_start", "batch", "stat_sb", "stat_sh", "kv_heads", "slack",
    "sink", "window", "stride", "log2_block", "phase_step", "phase_offset",
    "mask_entries", "mask_group", "mask_cols_per_head",
])  # fmt: skip
def attn_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_log2_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_q, cu_k, q_starts, k_starts, mask_cols,
    q_sb: tl.int64, q_ss: tl.int64, q_sh: tl.int64,
    k_sb: tl.int64, k_ss: tl.int64, k_sh: tl.int64,
    v_sb: tl.int64, v_ss: tl.int64, v_sh: tl.int64,
    do_sb: tl.int64, do_ss: tl.int64, do_sh: tl.int64,
    dk_sb: tl.int64, dk_ss: tl.int64, dk_sh: tl.int64,
    stat_sb: tl.int64, stat_sh: tl.int64,
    seqlen_q: tl.int32, seqlen_k: tl.int32, q_start: tl.int32, k_start: tl.int32,
    batch: tl.int32, kv_heads: tl.int32, slack: tl.int32, scale, scale_log2,
    sink: tl.int32, window: tl.int32, stride: tl.int32, log2_block: tl.int32,
    phase_step: tl.int32, phase_offset: tl.int32,
    mask_entries: tl.int32, mask_group: tl.int32, mask_cols_per_head: tl.int32,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
    GATHER: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = scale * dS^T Q, summed over a GQA group; grid (key tiles * kv_heads, 1, batch or 1).

    Heads vary fastest, so that every head's long tiles (sink, strided) start before anyone's short ones.
    """
    kv_head = tl.program_id(0) % kv_heads
    seq = tl.program_id(2)
    seq64 = seq.to(tl.int64)
    tile, q_first, q_len, k_first, k_len, q_start, k_start = sequence_of(
        tl.program_id(0) // kv_heads, BLOCK_N, slack, seqlen_q, seqlen_k, q_start, k_start,
        cu_q, cu_k, q_starts, k_starts, batch, False, VARLEN, HAS_Q_STARTS, HAS_K_STARTS,
    )  # fmt: skip
    q_end = q_start + q_len
    k_end = k_start + k_len
    head_phase = 0
    if STRIDED:
        head_phase = (phase_offset + phase_step * kv_head) % stride
    j, own, is_global, exists = column_tile(
        tile, k_start, k_end, head_phase, sink, stride, log2_block, BLOCK_N, WINDOW, STRIDED
    )
    if not exists:
        return
    j_first = tl.min(tl.where(own, j, 0x7FFFFFFF), 0)
    j_last = tl.max(tl.where(own, j, -1), 0)

    # The queries that see any key of the tile.
    p_lo = q_start
    p_hi = q_end
    if CAUSAL:
        p_lo = tl.maximum(j_first, q_start)
    if WINDOW == 1:
        p_hi = tl.where(is_global, q_end, tl.minimum(j_last + window, q_end))
    if WINDOW == 2:
        p_hi = tl.where(is_global, q_end, tl.minimum(((j_last >> log2_block) + window) << log2_block, q_end))
    p_tile0 = p_lo & -BLOCK_M
    n_tiles = tl.where(p_hi > p_lo, (p_hi - p_tile0 + BLOCK_M - 1) // BLOCK_M, 0)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    k_rows = (k_first - k_start) + j.to(tl.int64)
    own_ok = own[:, None] & d_ok[None, :]
    k = tl.load(k_ptr + seq64 * k_sb + kv_head * k_sh + k_rows[:, None] * k_ss + d[None, :], mask=own_ok, other=0.0)
    v = tl.load(v_ptr + seq64 * v_sb + kv_head * v_sh + k_rows[:, None] * v_ss + d[None, :], mask=own_ok, other=0.0)
    offsets = tl.arange(0, BLOCK_M)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        first_entry = 0
        if BLOCK_MASK:
            k_block = j_first >> log2_block
            column = tl.where(k_block < mask_cols_per_head, (head // mask_group) * mask_cols_per_head + k_block, -1)
            first_entry = tl.load(mask_cols + column, mask=column >= 0, other=0)
            last_entry = tl.load(mask_cols + column + 1, mask=column >= 0, other=0)
            n_tiles = tl.where(p_hi > p_lo, (last_entry - first_entry) * ((1 << log2_block) // BLOCK_M), 0)
        if not TMA:
            q_base = q_ptr + seq64 * q_sb + head * q_sh + (q_first - q_start).to(tl.int64) * q_ss + d[None, :]
            do_base = dout_ptr + seq64 * do_sb + head * do_sh + (q_first - q_start).to(tl.int64) * do_ss + d[None, :]
            row_base = seq64 * stat_sb + head * stat_sh + q_first - q_start
        for i in tl.range(0, n_tiles, num_stages=STAGES):
            p_tile = p_tile0 + i * BLOCK_M
            if BLOCK_MASK:
                per_block = (1 << log2_block) // BLOCK_M
                block = tl.load(mask_cols + mask_entries + first_entry + i // per_block)
                p_tile = (block << log2_block) + (i % per_block) * BLOCK_M
            p = p_tile + offsets
            if TMA:
                q = q_ptr.load([seq, head, p_tile - q_start, 0]).reshape(BLOCK_M, BLOCK_D)
                dout = dout_ptr.load([seq, head, p_tile - q_start, 0]).reshape(BLOCK_M, BLOCK_D)
                # Rows outside the sequence read as 0 everywhere: they weigh 1, times a dO and a dO V^T - delta of 0.
                lse_log2 = lse_log2_ptr.load([seq, head, p_tile - (q_start & -4)]).reshape(BLOCK_M)
                delta = delta_ptr.load([seq, head, p_tile - (q_start & -4)]).reshape(BLOCK_M)
            else:
                row_ok = (p >= q_start) & (p < q_end)
                q_ok = row_ok[:, None] & d_ok[None, :]
                q = tl.load(q_base + p.to(tl.int64)[:, None] * q_ss, mask=q_ok, other=0.0)
                dout = tl.load(do_base + p.to(tl.int64)[:, None] * do_ss, mask=q_ok, other=0.0)
                # Here they weigh exp2(s - inf) = 0.
                lse_log2 = tl.load(lse_log2_ptr + row_base + p, mask=row_ok, other=float("inf"))
                delta = tl.load(delta_ptr + row_base + p, mask=row_ok, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            masked = i < 0
            if CAUSAL:
                masked = p_tile < j_last
            if WINDOW == 1:
                masked = masked | ((p_tile + BLOCK_M - 1 - j_first >= window) & (not is_global))
            if WINDOW == 2:
                past = ((p_tile + BLOCK_M - 1) >> log2_block) - (j_first >> log2_block) >= window
                masked = masked | (past & (not is_global))
            if masked:
                seen = j[:, None] <= p[None, :]
                if WINDOW == 1:
                    seen = seen & (is_global | (p[None, :] - j[:, None] < window))
                if WINDOW == 2:
                    seen = seen & (is_global | ((p[None, :] >> log2_block) - (j[:, None] >> log2_block) < window))
                s = tl.where(seen, s, float("-inf"))
            w = tl.exp2(s * scale_log2 - lse_log2[None, :])
            dv = tl.dot(w.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dw = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = w * (dw - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    at = seq64 * dk_sb + kv_head * dk_sh + k_rows[:, None] * dk_ss + d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=own_ok)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=own_ok)
