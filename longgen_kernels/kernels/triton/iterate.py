"""Device code: which tiles a program visits, where they lie and which pairs of a tile are visible.

Every kernel takes a pattern as flags, known when it is compiled (BLOCK_MASK, CAUSAL, WINDOW, STRIDED), and as plain
integers, so that neither a new length nor a new window compiles anything. WINDOW is 0 (no limit), 1 (`window` counts
tokens) or 2 (`window` counts blocks). Tiles are aligned to positions, not to rows: blocks of a pattern or mask then
coincide with tiles whatever the offsets.

A query tile's keys are up to three runs: sink, strided blocks, window. Where two overlap the window's run has them, as
it alone applies the whole mask. A key tile's queries are one run. Key tiles are *global* (sink, strided: seen to the
end) or *local* (seen within the window), and strided blocks smaller than a tile are gathered so that no tile mixes
the two: a mixed tile would drag its local half through every later query.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_of(
    pid, block, slack, seqlen_q, seqlen_k, q_start, k_start, cu_q, cu_k, q_starts, k_starts, batch,
    BY_QUERY: tl.constexpr, VARLEN: tl.constexpr, HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr,
):  # fmt: skip
    """Which rows tile `pid` works on: (tile in its sequence, first q row, seqlen_q, first k row, seqlen_k, starts).

    Packed, seqlen_q and seqlen_k are the total rows. Sequence b owns the tiles from `cu[b] // block + slack * b` on,
    which is enough for all of its own and is found by bisection, without any metadata. Rows past the last sequence
    form one more, which has no partner rows.
    """
    tile = pid
    q_lo = 0
    k_lo = 0
    q_len = seqlen_q
    k_len = seqlen_k
    if VARLEN:
        cu = cu_q if BY_QUERY else cu_k
        total = seqlen_q if BY_QUERY else seqlen_k
        lo = 0
        hi = batch
        while lo < hi:
            mid = (lo + hi + 1) // 2
            first = tl.minimum(tl.maximum(tl.load(cu + mid), 0), total) // block + slack * mid
            lo = tl.where(first <= pid, mid, lo)
            hi = tl.where(first <= pid, hi, mid - 1)
        seq = lo
        real = seq < batch
        # Clipped, so that wrong offsets cannot reach outside the tensors.
        q_lo = tl.minimum(tl.maximum(tl.load(cu_q + seq), 0), seqlen_q)
        k_lo = tl.minimum(tl.maximum(tl.load(cu_k + seq), 0), seqlen_k)
        q_hi = tl.load(cu_q + seq + 1, mask=real, other=seqlen_q if BY_QUERY else 0)
        k_hi = tl.load(cu_k + seq + 1, mask=real, other=0 if BY_QUERY else seqlen_k)
        q_len = tl.minimum(tl.maximum(q_hi, q_lo), seqlen_q) - q_lo
        k_len = tl.minimum(tl.maximum(k_hi, k_lo), seqlen_k) - k_lo
        k_start = 0
        if HAS_K_STARTS:
            k_start = tl.load(k_starts + seq, mask=real, other=0)
        q_start = k_start + k_len - q_len
        if HAS_Q_STARTS:
            q_start = tl.load(q_starts + seq, mask=real, other=0)
        tile = pid - ((q_lo if BY_QUERY else k_lo) // block + slack * seq)
    return tile, q_lo, q_len, k_lo, k_len, q_start, k_start


@triton.jit
def ceil_div(a, b):
    """Rounded up, for a of either sign and b > 0, clipped at 0."""
    return tl.maximum((a + b - 1) // b, 0)


@triton.jit
def key_runs(
    p_first, p_last, k_start, k_end, head_phase, mask_row,
    sink, window, stride, log2_block, mask_rows,
    BLOCK_N: tl.constexpr, BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """The key tiles that queries at positions p_first..p_last (inclusive) visit.

    Returns (n_sink, n_window, sink_tile, window_tile, rank, columns, strided_lo, strided_hi): tile counts of two runs
    and their first tiles; first rank and number of columns of the strided blocks that lie in [strided_lo, strided_hi),
    between sink and window. With a block mask n_window counts the tiles of the row's list, `rank` is its first entry.
    """
    hi = k_end
    if CAUSAL:
        hi = tl.minimum(k_end, p_last + 1)
    n_sink = 0
    columns = 0
    sink_tile = k_start // BLOCK_N
    rank = 0
    strided_lo = 0
    strided_hi = 0
    if BLOCK_MASK:
        window_tile = 0
        per_block = (1 << log2_block) // BLOCK_N
        rank = tl.load(mask_rows + mask_row, mask=mask_row >= 0, other=0)
        last = tl.load(mask_rows + mask_row + 1, mask=mask_row >= 0, other=0)
        n_window = (last - rank) * per_block
    else:
        lo = k_start
        if WINDOW == 1:
            lo = p_first + 1 - window
        if WINDOW == 2:
            # No window of blocks reaches past the query itself, also not an empty one.
            lo = tl.minimum(((p_first >> log2_block) + 1 - window) << log2_block, p_first + 1)
        lo = tl.maximum(lo, k_start)
        window_tile = lo // BLOCK_N
        n_window = tl.where(hi > lo, ceil_div(hi, BLOCK_N) - window_tile, 0)
        if WINDOW != 0:
            # The other runs end where the window's first tile begins.
            strided_hi = tl.where(hi > lo, window_tile * BLOCK_N, hi)
            sink_hi = tl.minimum(sink, strided_hi)
            strided_lo = tl.maximum(sink_hi, k_start)
            n_sink = tl.where(sink_hi > k_start, ceil_div(sink_hi, BLOCK_N) - sink_tile, 0)
            if STRIDED:
                first = (stride - head_phase) % stride
                rank = ceil_div((strided_lo >> log2_block) - first, stride)
                end = ceil_div(((strided_hi + (1 << log2_block) - 1) >> log2_block) - first, stride)
                # The window may begin inside the last block; what it has is cut off.
                overhang = tl.maximum(((first + (end - 1) * stride + 1) << log2_block) - strided_hi, 0)
                columns = tl.maximum(((end - rank) << log2_block) - overhang, 0)
                columns = tl.where(strided_hi > strided_lo, columns, 0)
    return n_sink, n_window, sink_tile, window_tile, rank, columns, strided_lo, strided_hi


@triton.jit
def query_tile(
    tile, head, kv_head, q_start, q_len, k_start, k_len, mask_group, mask_rows_per_head,
    phase_step, phase_offset, sink, window, stride, log2_block, mask_rows,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """Where query tile `tile` of a sequence stands (p_tile, p_first, p_last, head_phase), then its `key_runs`.

    Tiles are aligned to positions, also below 0, so that the first one may begin before row 0.
    """
    p_tile = (q_start & -BLOCK_M) + tile * BLOCK_M
    p_first = tl.maximum(p_tile, q_start)
    p_last = tl.minimum(p_tile + BLOCK_M, q_start + q_len) - 1
    head_phase = 0
    if STRIDED:
        head_phase = (phase_offset + phase_step * kv_head) % stride
    mask_row = 0
    if BLOCK_MASK:
        q_block = p_tile >> log2_block
        inside = (q_block >= 0) & (q_block < mask_rows_per_head)
        mask_row = tl.where(inside, (head // mask_group) * mask_rows_per_head + q_block, -1)
    n_sink, n_window, sink_tile, window_tile, rank, n_columns, strided_lo, strided_hi = key_runs(
        p_first, p_last, k_start, k_start + k_len, head_phase, mask_row, sink, window, stride, log2_block, mask_rows,
        BLOCK_N, BLOCK_MASK, CAUSAL, WINDOW, STRIDED,
    )  # fmt: skip
    return (
        p_tile, p_first, p_last, head_phase,
        n_sink, n_window, sink_tile, window_tile, rank, n_columns, strided_lo, strided_hi,
    )  # fmt: skip


@triton.jit
def key_tile(
    i, p_first, p_last, k_start, k_end, head_phase, n_sink, n_strided, sink_tile, window_tile, rank, columns,
    strided_lo, strided_hi, sink, window, stride, log2_block, mask_rows, mask_entries,
    BLOCK_N: tl.constexpr, BLOCK_MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """The i-th key tile: (base position, is it gathered from strided blocks, does it need a mask, run_lo, run_hi).

    run_lo and run_hi bound the positions that the tile's run may show.
    """
    gathered = i < 0
    run_lo = k_start
    run_hi = k_end
    if BLOCK_MASK:
        per_block = (1 << log2_block) // BLOCK_N
        block = tl.load(mask_rows + mask_entries + rank + i // per_block)
        base = (block << log2_block) + (i % per_block) * BLOCK_N
    else:
        base = (window_tile + i - n_sink - n_strided) * BLOCK_N
    masked = (base < k_start) | (base + BLOCK_N > k_end)
    if CAUSAL:
        masked = masked | (base + BLOCK_N - 1 > p_first)
    if WINDOW == 1:
        masked = masked | (p_last - base >= window)
    if WINDOW == 2:
        masked = masked | ((p_last >> log2_block) - (base >> log2_block) >= window)
    if WINDOW != 0:
        if i < n_sink:
            base = (sink_tile + i) * BLOCK_N
            run_hi = tl.minimum(sink, strided_hi)
            masked = (base < k_start) | (base + BLOCK_N > run_hi)
        if STRIDED:
            if (i >= n_sink) & (i < n_sink + n_strided):
                gathered = i >= 0
                first = (stride - head_phase) % stride
                column = (i - n_sink) * BLOCK_N
                block = first + (rank + (column >> log2_block)) * stride
                base = (block << log2_block) + (column & ((1 << log2_block) - 1))
                run_lo = strided_lo
                run_hi = strided_hi
                masked = (base < run_lo) | (column + BLOCK_N > columns)
    return base, gathered, masked, run_lo, run_hi


@triton.jit
def gather_offsets(columns, stride, log2_block):
    """Positions of a gathered tile's columns relative to its base."""
    return (((columns >> log2_block) * stride) << log2_block) + (columns & ((1 << log2_block) - 1))


@triton.jit
def visible_tile(
    p, j, base, run_lo, run_hi, head_phase, sink, window, stride, log2_block,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Visible pairs for query positions p (column vector) and the key positions j (row vector) of the tile at `base`.

    GATHER says that a pattern's blocks are smaller than a tile, so that a tile holds several.
    """
    seen = (j >= run_lo) & (j < run_hi)
    if CAUSAL:
        seen = seen & (j <= p)
    if WINDOW != 0:
        if WINDOW == 1:
            near = p - j < window
        else:
            near = (p >> log2_block) - (j >> log2_block) < window
        far = j < sink
        if STRIDED:
            if GATHER:
                far = far | (((j >> log2_block) + head_phase) % stride == 0)
            else:  # the tile lies in one block: one division serves all its columns
                far = far | (((base >> log2_block) + head_phase) % stride == 0)
        seen = seen & (near | far)
    return seen


@triton.jit
def column_tile(
    t, k_start, k_end, head_phase, sink, stride, log2_block,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """Key tile `t` of the backward pass: (positions, which of them are its own, is it global, does it exist).

    Global tiles come first: they are the longest.
    """
    columns = tl.arange(0, BLOCK_N)
    if WINDOW == 0:
        tile = k_start // BLOCK_N + t
        j = tile * BLOCK_N + columns
        return j, (j >= k_start) & (j < k_end), t < 0, tile * BLOCK_N < k_end
    sink_tile = k_start // BLOCK_N
    sink_hi = tl.minimum(sink, k_end)
    n_sink = tl.where(sink_hi > k_start, ceil_div(sink_hi, BLOCK_N) - sink_tile, 0)
    rest = tl.maximum(sink, k_start)
    n_strided = 0
    if STRIDED:
        first = (stride - head_phase) % stride
        block_lo = rest >> log2_block
        block_hi = tl.maximum((k_end + (1 << log2_block) - 1) >> log2_block, block_lo)
        rank = ceil_div(block_lo - first, stride)
        rank_end = ceil_div(block_hi - first, stride)
        # A block may be far longer than the sequence: what of it lies outside makes no tiles.
        outside = (rest - (block_lo << log2_block)) // BLOCK_N
        starts_strided = first + rank * stride == block_lo
        past = tl.maximum(((first + (rank_end - 1) * stride + 1) << log2_block) - k_end, 0)
        n_strided = ceil_div(((rank_end - rank) << log2_block) - past, BLOCK_N) - tl.where(starts_strided, outside, 0)
        n_strided = tl.where((k_end > rest) & (rank_end > rank), n_strided, 0)
    j = (sink_tile + t) * BLOCK_N + columns
    own = (j >= k_start) & (j < sink_hi)
    exists = t >= 0
    if t >= n_sink:
        u = t - n_sink
        if STRIDED:
            # Blocks of one class are consecutive by rank: rank r of the strided ones is block first + r * stride,
            # rank l of the others skips one block in every stride.
            column = (u + tl.where(starts_strided, outside, 0)) * BLOCK_N
            block = first + (rank + ((column + columns) >> log2_block)) * stride
            if u >= n_strided:
                column = (u - n_strided + tl.where(starts_strided, 0, outside)) * BLOCK_N
                local_lo = block_lo - ceil_div(block_lo - first, stride)
                local_hi = block_hi - ceil_div(block_hi - first, stride)
                local = local_lo + ((column + columns) >> log2_block)
                skipped = tl.where(local < first, 0, (local - first) // tl.maximum(stride - 1, 1) + 1)
                block = local + skipped
                exists = column < ((local_hi - local_lo) << log2_block)
            j = (block << log2_block) + ((column + columns) & ((1 << log2_block) - 1))
        else:
            j = (rest // BLOCK_N + u) * BLOCK_N + columns
            exists = (rest // BLOCK_N + u) * BLOCK_N < k_end
        own = (j >= rest) & (j < k_end)
        exists = exists & (k_end > rest)
    return j, own, t < n_sink + n_strided, exists
