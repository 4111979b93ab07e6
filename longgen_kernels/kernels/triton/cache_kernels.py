"""Attention to a KV cache: split-KV kernel, the kernel that combines the splits, and the one that appends.

A cache's tiles are enumerated in two runs: its permanent tokens, in order of their slots, and the part of its ring that
the window still shows, in order of position. Each run's slots are consecutive but for the end of the ring, so that
tiles are read in long rows. How many tiles there are follows from the lengths, which only the device knows; the number
of splits does not, so that a CUDA graph stays right while a cache grows.
"""

import triton
import triton.language as tl

from longgen_kernels.kernels.triton.iterate import ceil_div


@triton.jit
def sequence_end(seqlens, counts, b, n_new, HAS_COUNTS: tl.constexpr):
    """Tokens of sequence `b` before the call, and with the new ones."""
    seqlen = tl.load(seqlens + b)
    added = n_new
    if HAS_COUNTS:
        added = tl.minimum(tl.maximum(tl.load(counts + b), 0), n_new)
    return seqlen, seqlen + added


@triton.jit
def first_strided(sink_slots, head_phase, stride, log2_block):
    """The first strided block that has permanent slots of its own: earlier ones lie in the sink."""
    low = sink_slots >> log2_block
    return low + (stride - (low + head_phase) % stride) % stride


@triton.jit
def row_address(slot, ok, table, b, pages, log2_page, sb, ss, PAGED: tl.constexpr):
    """Offset of a slot's row in the cache, without the head, and whether there is such a row."""
    if PAGED:
        page = tl.load(table + b.to(tl.int64) * pages + (slot >> log2_page), mask=ok, other=-1)
        inside = slot & ((1 << log2_page) - 1)
        return page.to(tl.int64) * sb + inside.to(tl.int64) * ss, ok & (page >= 0)
    else:
        return b.to(tl.int64) * sb + slot.to(tl.int64) * ss, ok


@triton.jit
def from_fp8(x, dtype: tl.constexpr):
    """The values of e4m3 bytes, exactly. In integers: before sm_89 there are no conversions."""
    magnitude = (x & 0x7F).to(tl.uint16)
    # As fp16 the exponent is 8 too small; e4m3's one NaN becomes fp16's.
    bits = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7) | ((x & 0x80).to(tl.uint16) << 8)
    return (bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0).to(dtype)


@triton.jit
def to_fp8(x):
    """fp32 as e4m3 bytes: rounded to the nearest, ties to even, saturating at 448; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Of normal results the last 20 of fp32's 23 bits go, and the exponent's bias is 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2 ** -6 results are multiples of 2 ** -9, as the last bits of fp32 numbers from 2 ** 14 on are.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    result = tl.where(magnitude < 0x3C800000, small, normal)
    result = tl.where(magnitude >= 0x43E00000, 0x7E, result)
    result = tl.where(magnitude > 0x7F800000, 0x7F, result)
    return (result | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=[
    "n", "n_new", "q_offset", "slots", "pages", "log2_page", "splits", "row_tiles",
    "sink", "sink_slots", "ring", "window", "stride", "log2_block", "phase_step", "phase_offset",
])  # fmt: skip
def cache_attn_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlens, counts, table, k_scales, v_scales,
    q_sb: tl.int64, q_ss: tl.int64, q_sh: tl.int64,
    k_sb: tl.int64, k_sh: tl.int64, k_ss: tl.int64,
    v_sb: tl.int64, v_sh: tl.int64, v_ss: tl.int64,
    out_split: tl.int64, lse_split: tl.int64,
    n: tl.int32, n_new: tl.int32, q_offset: tl.int32, slots: tl.int32, pages: tl.int32, log2_page: tl.int32,
    splits: tl.int32, row_tiles: tl.int32, scale_log2,
    sink: tl.int32, sink_slots: tl.int32, ring: tl.int32, window: tl.int32, stride: tl.int32, log2_block: tl.int32,
    phase_step: tl.int32, phase_offset: tl.int32,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, STRIDED: tl.constexpr, COMPACT: tl.constexpr, PAGED: tl.constexpr,
    HAS_COUNTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M rows (token-major: token, head of the group) to one split of a sequence's tiles.

    Grid (splits * row tiles, kv_heads, batch). out (splits, batch, n, q_heads, HEAD_DIM) and lse (splits, batch,
    q_heads, n), contiguous; a split that sees nothing writes 0 and -inf.
    """
    split = tl.program_id(0) % splits
    row_tile = tl.program_id(0) // splits
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    seqlen, end = sequence_end(seqlens, counts, b, n_new, HAS_COUNTS)

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < n * GROUP
    token = row // GROUP
    q_head = kv_head * GROUP + row % GROUP
    p = seqlen + q_offset + token
    p_first = seqlen + q_offset + row_tile * BLOCK_M // GROUP
    p_last = seqlen + q_offset + tl.minimum((row_tile + 1) * BLOCK_M - 1, n * GROUP - 1) // GROUP

    head_phase = 0
    first = 0
    if STRIDED:
        head_phase = (phase_offset + phase_step * kv_head) % stride
        first = first_strided(sink_slots, head_phase, stride, log2_block)
    if not COMPACT:
        end = tl.minimum(end, slots)
    hi = tl.minimum(end, p_last + 1)
    n_permanent = tl.minimum(hi, sink_slots)
    if STRIDED:
        if hi > sink_slots:
            blocks = ceil_div(ceil_div(hi, 1 << log2_block) - first, stride)
            overhang = tl.maximum(((first + (blocks - 1) * stride + 1) << log2_block) - hi, 0)
            n_permanent += tl.where(blocks > 0, (blocks << log2_block) - overhang, 0)
    if COMPACT:
        n_permanent = tl.minimum(n_permanent, slots - ring)
    permanent_tiles = ceil_div(n_permanent, BLOCK_N)
    lo = 0
    ring_tile = 0
    tiles = permanent_tiles
    if WINDOW != 0:
        lo = p_first + 1 - window
        if WINDOW == 2:
            lo = ((p_first >> log2_block) + 1 - window) << log2_block
        lo = tl.maximum(lo, sink_slots)
        ring_tile = lo // BLOCK_N
        tiles += tl.where((hi > lo) & (window > 0), ceil_div(hi, BLOCK_N) - ring_tile, 0)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    columns = tl.arange(0, BLOCK_N)
    if FP8:
        scale_log2 = scale_log2 * tl.load(k_scales + kv_head)
    q = tl.load(
        q_ptr + b64 * q_sb + token.to(tl.int64)[:, None] * q_ss + q_head.to(tl.int64)[:, None] * q_sh + d[None, :],
        mask=row_ok[:, None] & d_ok[None, :], other=0.0,
    )  # fmt: skip
    k_base = k_ptr + kv_head.to(tl.int64) * k_sh + d[None, :]
    v_base = v_ptr + kv_head.to(tl.int64) * v_sh + d[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Tiles times splits may pass 2^31 at a million tokens of one tile each.
    first_tile = (split.to(tl.int64) * tiles // splits).to(tl.int32)
    last_tile = ((split.to(tl.int64) + 1) * tiles // splits).to(tl.int32)
    for t in tl.range(first_tile, last_tile, num_stages=STAGES):
        permanent = t < permanent_tiles
        index = t * BLOCK_N + columns
        j = index
        here = index < n_permanent
        if STRIDED:
            strided = index - sink_slots
            strided_j = ((first + (strided >> log2_block) * stride) << log2_block) + (strided & ((1 << log2_block) - 1))
            j = tl.where(index < sink_slots, index, strided_j)
            here = here & ((index < sink_slots) | (j >= sink_slots))
        slot = index
        if COMPACT:
            slot = index + ring
        if WINDOW != 0:
            recent = (ring_tile + t - permanent_tiles) * BLOCK_N + columns
            recent_here = (recent >= lo) & (recent < hi)
            if STRIDED:
                recent_here = recent_here & (((recent >> log2_block) + head_phase) % stride != 0)
            j = tl.where(permanent, j, recent)
            here = tl.where(permanent, here, recent_here)
            if COMPACT:
                slot = tl.where(permanent, slot, recent % tl.maximum(ring, 1))
        if not COMPACT:
            slot = j
        here = here & (j < hi)
        k_row, k_ok = row_address(slot, here, table, b, pages, log2_page, k_sb, k_ss, PAGED)
        v_row, v_ok = row_address(slot, here, table, b, pages, log2_page, v_sb, v_ss, PAGED)
        k = tl.load(k_base + k_row[:, None], mask=k_ok[:, None] & d_ok[None, :], other=0.0)
        v = tl.load(v_base + v_row[:, None], mask=v_ok[:, None] & d_ok[None, :], other=0.0)
        if FP8:
            k = from_fp8(k, q.dtype)
            v = from_fp8(v, q.dtype)
        seen = k_ok[None, :] & (j[None, :] <= p[:, None])
        if WINDOW != 0:
            if WINDOW == 1:
                near = p[:, None] - j[None, :] < window
            else:
                near = (p[:, None] >> log2_block) - (j[None, :] >> log2_block) < window
            far = j < sink
            if STRIDED:
                far = far | (((j >> log2_block) + head_phase) % stride == 0)
            seen = seen & (near | far[None, :])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        # A row that has seen nothing yet keeps m = -inf; 0 in its place makes its weights exp2(-inf) = 0.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        w = tl.exp2(s * scale_log2 - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    seen_any = denom != 0.0  # NaN is not 0: it stays NaN
    out = acc / tl.where(seen_any, denom, 1.0)[:, None]
    if FP8:
        out = out * tl.load(v_scales + kv_head)
    lse = tl.where(seen_any, (m + tl.log2(tl.where(seen_any, denom, 1.0))) * 0.6931471805599453, float("-inf"))
    q_heads = kv_heads * GROUP
    out_row = split.to(tl.int64) * out_split + ((b64 * n + token) * q_heads + q_head) * HEAD_DIM
    tl.store(
        out_ptr + out_row[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & d_ok[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + split.to(tl.int64) * lse_split + (b64 * q_heads + q_head) * n + token, lse, mask=row_ok)


@triton.jit(do_not_specialize=["n", "q_heads", "splits"])
def cache_combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, out_split: tl.int64, lse_split: tl.int64,
    n: tl.int32, q_heads: tl.int32, splits: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row by their LSE; grid (batch * n * q_heads,). Shapes as in `cache_attn_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    head = row % q_heads
    token = row // q_heads % n
    b = row // q_heads // n
    s = tl.arange(0, BLOCK_S)
    s_ok = s < splits
    d = tl.arange(0, BLOCK_D)
    lse_row = (b * q_heads + head) * n + token
    lse = tl.load(part_lse_ptr + s.to(tl.int64) * lse_split + lse_row, mask=s_ok, other=float("-inf"))
    m = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weight, 0)
    part = tl.load(
        part_ptr + s.to(tl.int64)[:, None] * out_split + row * HEAD_DIM + d[None, :],
        mask=s_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    out = tl.sum(part * weight[:, None], 0) / tl.where(total != 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse_ptr + lse_row, m + tl.log(tl.where(total != 0.0, total, 1.0)))


@triton.jit(do_not_specialize=[
    "n_new", "slots", "pages", "log2_page", "sink_slots", "ring", "stride", "log2_block", "phase_step", "phase_offset",
])  # fmt: skip
def cache_append_kernel(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, seqlens, counts, table, k_scales, v_scales,
    new_k_sb: tl.int64, new_k_ss: tl.int64, new_k_sh: tl.int64,
    new_v_sb: tl.int64, new_v_ss: tl.int64, new_v_sh: tl.int64,
    k_sb: tl.int64, k_sh: tl.int64, k_ss: tl.int64,
    v_sb: tl.int64, v_sh: tl.int64, v_ss: tl.int64,
    n_new: tl.int32, slots: tl.int32, pages: tl.int32, log2_page: tl.int32,
    sink_slots: tl.int32, ring: tl.int32, stride: tl.int32, log2_block: tl.int32,
    phase_step: tl.int32, phase_offset: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    STRIDED: tl.constexpr, COMPACT: tl.constexpr, PAGED: tl.constexpr, HAS_COUNTS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_T new tokens of a KV head to their slots; grid (tiles of tokens, kv_heads, batch)."""
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2)
    b64 = b.to(tl.int64)
    seqlen, end = sequence_end(seqlens, counts, b, n_new, HAS_COUNTS)
    i = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = seqlen + i
    slot = j
    ok = j < end
    if COMPACT:
        permanent = j < sink_slots
        slot = ring + j
        if STRIDED:
            head_phase = (phase_offset + phase_step * tl.program_id(1)) % stride
            first = first_strided(sink_slots, head_phase, stride, log2_block)
            rank = ((j >> log2_block) - first) // stride
            inside = j & ((1 << log2_block) - 1)
            slot = tl.where(permanent, slot, ring + sink_slots + (rank << log2_block) + inside)
            permanent = permanent | (((j >> log2_block) + head_phase) % stride == 0)
        slot = tl.where(permanent, slot, j % tl.maximum(ring, 1))
        # Of two new tokens for one slot of the ring the later one stays; without a ring none does.
        ok = ok & (permanent | (j + ring >= end))
    ok = ok & (slot < slots)
    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    k_row, k_ok = row_address(slot, ok, table, b, pages, log2_page, k_sb, k_ss, PAGED)
    v_row, v_ok = row_address(slot, ok, table, b, pages, log2_page, v_sb, v_ss, PAGED)
    k_mask = k_ok[:, None] & d_ok[None, :]
    v_mask = v_ok[:, None] & d_ok[None, :]
    i64 = i.to(tl.int64)[:, None]
    k = tl.load(new_k_ptr + b64 * new_k_sb + i64 * new_k_ss + kv_head * new_k_sh + d[None, :], mask=k_mask)
    v = tl.load(new_v_ptr + b64 * new_v_sb + i64 * new_v_ss + kv_head * new_v_sh + d[None, :], mask=v_mask)
    if FP8:
        k = to_fp8(k.to(tl.float32) * tl.div_rn(1.0, tl.load(k_scales + kv_head)))
        v = to_fp8(v.to(tl.float32) * tl.div_rn(1.0, tl.load(v_scales + kv_head)))
    tl.store(k_ptr + k_row[:, None] + kv_head * k_sh + d[None, :], k, mask=k_mask)
    tl.store(v_ptr + v_row[:, None] + kv_head * v_sh + d[None, :], v, mask=v_mask)
