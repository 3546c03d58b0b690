"""Triton kernels of block_sparse_attention's gradients: of the queries, and of the keys and values."""

import triton
import triton.language as tl


@triton.jit
def _seen(o_row, o_key, kv_len, WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr):
    """BlockMask.sees()."""
    seen = o_key <= o_row
    if WINDOW >= 0:
        near = (o_row - o_key < WINDOW) | (o_key < SINK) | (o_row >= kv_len - LAST)
        if STRIDE > 0:
            near = near | ((o_row - o_key) % STRIDE == 0)
        seen = seen & near
    return seen


@triton.jit
def _dq_tile(
    b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, o_row, o_key, scale_log2, kv_len,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # [BM, BN]
    b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
    b_dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        b_p = tl.where(_seen(o_row[:, None], o_key[None, :], kv_len, WINDOW, SINK, LAST, STRIDE), b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


# Sizes that differ from call to call would make a new kernel each, and an edge of known length 1 would make ptxas serialise
# every wgmma (C7511).
@triton.jit(do_not_specialize=["q_len", "kv_len", "rows", "width", "edge_tiles", "together"])
def block_sparse_attention_bwd_dq_kernel(
    q_box, k_box, v_box, o_box, do_box, dq_box, lse, dlse, terms, kv_num, kv_index,
    stride_mask_batch, heads, group, mask_heads, q_len, kv_len, rows, width, edge_tiles, together, scale, scale_log2,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, HAS_DLSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq of BM query rows of one head, in the order of the forward kernel. Also what the kernel of the keys needs
    of these rows, `terms`: lse in base 2, and minus delta, the row sums of dO * O less dlse. Rows after the last get an
    infinite lse, which makes every probability 0 without a mask.
    """
    i_tile = tl.num_programs(0) // together - 1 - tl.program_id(0) // together
    i_bh = tl.program_id(1) * together + tl.program_id(0) % together
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_kv = i_h // group
    i_mask = (i_b * stride_mask_batch + i_h // (heads // mask_heads)).to(tl.int64) * rows + i_tile * BM // Q_BLOCK
    kv_index += i_mask * width
    SPLIT: tl.constexpr = KV_BLOCK // BN
    tiles = tl.load(kv_num + i_mask) * SPLIT
    i_next = tl.load(kv_index)

    o_m = i_tile * BM + tl.arange(0, BM)
    o_row = o_m + kv_len - q_len
    o_n = tl.arange(0, BN)
    o_line = i_bh.to(tl.int64) * q_len + o_m
    # [BM, BD]
    b_do = do_box.load([i_b, i_h, i_tile * BM, 0]).reshape(BM, BD)
    b_o = o_box.load([i_b, i_h, i_tile * BM, 0]).reshape(BM, BD)
    # [BM]
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if HAS_DLSE:
        b_delta -= tl.load(dlse + o_line, mask=o_m < q_len, other=0.0)
    b_lse = tl.load(lse + o_line, mask=o_m < q_len, other=float("inf")) * 1.4426950408889634
    p_term = terms + i_bh.to(tl.int64) * 2 * rows * Q_BLOCK + o_m
    tl.store(p_term, b_lse)
    tl.store(p_term + rows * Q_BLOCK, -b_delta)
    b_q = q_box.load([i_b, i_h, i_tile * BM, 0]).reshape(BM, BD)
    b_dq = tl.zeros([BM, BD], tl.float32)

    for i in range(0, tl.minimum(tiles, edge_tiles)):
        t = tiles - 1 - i
        first = tl.load(kv_index + t // SPLIT) * KV_BLOCK + t % SPLIT * BN
        b_k = k_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_v = v_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_dq = _dq_tile(
            b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, o_row, first + o_n, scale_log2, kv_len,
            WINDOW, SINK, LAST, STRIDE, True, PRECISION,
        )  # fmt: skip
    for t in range(0, tiles - edge_tiles):
        first = i_next * KV_BLOCK + t % SPLIT * BN
        i_next = tl.load(kv_index + (t + 1) // SPLIT)  # edge_tiles >= SPLIT, so this stays inside the row's list
        b_k = k_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_v = v_box.load([i_b, i_kv, first, 0]).reshape(BN, BD)
        b_dq = _dq_tile(
            b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, o_row, first + o_n, scale_log2, kv_len,
            WINDOW, SINK, LAST, STRIDE, WINDOW >= 0, PRECISION,
        )  # fmt: skip
    dq_box.store([i_b, i_h, i_tile * BM, 0], (b_dq * scale).to(b_q.dtype).reshape(1, 1, BM, BD))


@triton.jit
def _dkdv_tile(
    b_k, b_v, b_dk, b_dv, b_q, b_do, b_lse, b_minus_delta, o_row, o_key, scale_log2, kv_len,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Transposed, so that P and dS go from the registers of one product straight into the next."""
    # [BN, BM]
    b_s = tl.dot(b_k, b_q.T, input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        b_p = tl.where(_seen(o_row[None, :], o_key[:, None], kv_len, WINDOW, SINK, LAST, STRIDE), b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    # dP - delta: a sum that starts at -delta takes no registers for delta beside it.
    b_dp = tl.dot(b_v, b_do.T, tl.broadcast_to(b_minus_delta[None, :], b_p.shape), input_precision=PRECISION)
    b_dk = tl.dot((b_p * b_dp).to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _dkdv_step(
    entry, t, b_k, b_v, b_dk, b_dv, q_box, do_box, terms, i_b, i_kv, o_m, o_key, scale_log2, q_len, kv_len, padded_len,
    BM: tl.constexpr, BD: tl.constexpr, Q_BLOCK: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile t of the query rows that list the keys: its head and rows are in the list's `entry`."""
    REPEAT: tl.constexpr = GROUP // LISTED
    i_g = entry % LISTED + t % REPEAT
    first = entry // LISTED * Q_BLOCK + t // REPEAT % (Q_BLOCK // BM) * BM
    b_q = q_box.load([i_b, i_kv * GROUP + i_g, first, 0]).reshape(BM, BD)
    b_do = do_box.load([i_b, i_kv * GROUP + i_g, first, 0]).reshape(BM, BD)
    p_term = terms + (i_g.to(tl.int64) * 2 * padded_len + first) + o_m
    b_lse = tl.load(p_term)
    b_minus_delta = tl.load(p_term + padded_len)
    return _dkdv_tile(
        b_k, b_v, b_dk, b_dv, b_q, b_do, b_lse, b_minus_delta, first + o_m + kv_len - q_len, o_key, scale_log2, kv_len,
        WINDOW, SINK, LAST, STRIDE, MASKED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "q_len", "kv_len", "limit", "parts"])
def block_sparse_attention_bwd_dkdv_kernel(
    q_box, k_box, v_box, do_box, dk_box, dv_box, terms, list_start, entries, sums, turns,
    stride_list_batch, stride_list_head, blocks, kv_heads, q_len, kv_len, padded_len, limit, parts, scale, scale_log2,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, LISTED: tl.constexpr, EDGE: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BN keys of one KV head, over at most `limit` entries of the list of their key block.

    An entry is a query block of one of LISTED heads: of each of the GROUP query heads, or of all of them together. Entries
    ascend by query block, so those at the diagonal come first; they are masked, and go first (see the forward kernel). The
    rest goes from the end, so that programs that start together read the same queries at the same time.
    A longer list has up to `parts` programs, which add to `sums` in turn: the order, and so every bit, is always the same.
    """
    part = tl.program_id(0) % parts
    i_tile = tl.program_id(0) // parts  # long lists first
    i_b = tl.program_id(1) // kv_heads
    i_kv = tl.program_id(1) % kv_heads
    i_list = (i_b * stride_list_batch + i_kv * stride_list_head).to(tl.int64) * blocks + i_tile * BN // KV_BLOCK
    start = tl.load(list_start + i_list)
    listed = (tl.load(list_start + i_list + 1) - start).to(tl.int32)
    if part * limit >= tl.maximum(listed, 1):
        return
    mine = tl.minimum(listed - part * limit, limit)
    entries += start + part * limit
    TILES: tl.constexpr = GROUP // LISTED * (Q_BLOCK // BM)

    o_key = i_tile * BN + tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    o_edge = tl.arange(0, EDGE)
    b_first = tl.load(entries + o_edge, mask=o_edge < mine, other=0) // LISTED * Q_BLOCK + kv_len - q_len
    edge = tl.sum(((b_first < i_tile * BN + BN - 1) & (o_edge < mine)).to(tl.int32), 0)
    terms += (i_b * kv_heads + i_kv).to(tl.int64) * GROUP * 2 * padded_len
    # [BN, BD]
    b_k = k_box.load([i_b, i_kv, i_tile * BN, 0]).reshape(BN, BD)
    b_v = v_box.load([i_b, i_kv, i_tile * BN, 0]).reshape(BN, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)

    for t in range(0, edge * TILES):
        b_dk, b_dv = _dkdv_step(
            tl.load(entries + t // TILES), t, b_k, b_v, b_dk, b_dv, q_box, do_box, terms, i_b, i_kv, o_m, o_key,
            scale_log2, q_len, kv_len, padded_len, BM, BD, Q_BLOCK, GROUP, LISTED, WINDOW, SINK, LAST, STRIDE, True, PRECISION,
        )  # fmt: skip
    for t in range(0, (mine - edge) * TILES):
        b_dk, b_dv = _dkdv_step(
            tl.load(entries + mine - 1 - t // TILES), t, b_k, b_v, b_dk, b_dv, q_box, do_box, terms, i_b, i_kv, o_m, o_key,
            scale_log2, q_len, kv_len, padded_len, BM, BD, Q_BLOCK, GROUP, LISTED, WINDOW, SINK, LAST, STRIDE, WINDOW >= 0,
            PRECISION,
        )  # fmt: skip

    last = (part + 1) * limit >= listed
    if listed > limit:
        slot = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // parts) + i_tile
        p_sum = sums + slot * 2 * BN * BD + tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]
        turn = tl.atomic_add(turns + slot, 0, sem="acquire")
        while turn < part:  # earlier parts were launched earlier, so they run or have run
            turn = tl.atomic_add(turns + slot, 0, sem="acquire")
        tl.debug_barrier()
        if part > 0:
            b_dk += tl.load(p_sum, cache_modifier=".cg")
            b_dv += tl.load(p_sum + BN * BD, cache_modifier=".cg")
        if not last:
            tl.store(p_sum, b_dk)
            tl.store(p_sum + BN * BD, b_dv)
            tl.debug_barrier()
            tl.atomic_xchg(turns + slot, part + 1, sem="release")
    if last:
        dk_box.store([i_b, i_kv, i_tile * BN, 0], (b_dk * scale).to(b_k.dtype).reshape(1, 1, BN, BD))
        dv_box.store([i_b, i_kv, i_tile * BN, 0], b_dv.to(b_k.dtype).reshape(1, 1, BN, BD))
