"""The kernel of hopper_attention.py in which warpgroups share K and V: a producer warp and two consumers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_kernels import (
    LANES,
    ROWS,
    RUN_TIME,
    _barriers,
    _begin_step,
    _boxes,
    _copy_in,
    _end_step,
    _load,
    _operand,
    _row_sums,
    _score,
    _softmax_step,
    _store_out,
    _tile,
    _turns,
    _unit,
)  # fmt: skip

TEAM = gl.constexpr(2)  # consumers


@gluon.jit
def _place(turn, plan, PACK: gl.constexpr):
    """(tile, batch, first query head, KV head, blocks listed, list) of a turn's unit of work."""
    kv_num, kv_index, units, tiles, together, heads, group, stride_mask_batch, mask_heads, width = plan
    i_tile, i_pack = _tile(_unit(turn), units, tiles, together)
    i_bh = i_pack * PACK
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_mask = (i_b * stride_mask_batch + i_h // (heads // mask_heads)) * tiles + i_tile
    n = gl.load(kv_num + i_mask)
    return i_tile, i_b, i_h, i_h // group, n, kv_index + i_mask.to(gl.int64) * width


@gluon.jit
def _steps(n, edge, PER: gl.constexpr):
    """(steps of PER blocks, how many of them are masked, how many parts of the first one repeat a block)."""
    pad = (PER - n % PER) % PER
    steps = gl.cdiv(n, PER)
    return steps, gl.minimum(gl.cdiv(edge + pad, PER), steps), pad


@gluon.jit
def _entry(t, part, n, masked, pad, PER: gl.constexpr):
    """Which entry of a list of n blocks is a part of step t: the last ones in the masked steps, then from the start."""
    walked = t * PER + part - pad
    last = masked * PER - pad
    return gl.where(walked < last, n - 1 - gl.maximum(walked, 0), walked - last)


@gluon.jit
def _fill(box, pipe, i, t, n, masked, pad, kv_index, i_b, i_kv, KV: gl.constexpr):
    """The keys or values of step t, the producer's i-th, once every consumer has released their slot."""
    smem, full, empty = pipe
    STAGES: gl.constexpr = smem.shape[0]
    BN: gl.constexpr = smem.shape[1]
    D: gl.constexpr = smem.shape[2]
    PER: gl.constexpr = BN // KV
    slot = i % STAGES
    mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), BN * D * 2)
    if PER == 1:
        first = gl.load(kv_index + _entry(t, 0, n, masked, pad, 1)) * KV
        _copy_in(box, i_b, i_kv, first, full.index(slot), smem.index(slot), True)
    else:  # a tile is swizzled in columns of 64 channels, whose parts are the boxes
        boxes = _boxes(smem.index(slot), box, D // 64 * PER)
        for part in gl.static_range(PER):
            first = gl.load(kv_index + _entry(t, part, n, masked, pad, PER)) * KV
            for c in gl.static_range(D // 64):
                _load(box, [i_b, i_kv, first, c * 64], full.index(slot), boxes.index(c * PER + part))


@gluon.jit
def _produce(q_box, k_box, v_box, pipes, plan, edge, KV: gl.constexpr, PACK: gl.constexpr):
    q_smem, q_full, q_empty = pipes[0]
    i = 0
    for turn in range(0, _turns(plan[2])):
        i_tile, i_b, i_h, i_kv, n, kv_list = _place(turn, plan, PACK)
        steps, masked, pad = _steps(n, edge, pipes[1][0].shape[1] // KV)
        for t in range(0, steps):
            _fill(k_box, pipes[1], i, t, n, masked, pad, kv_list, i_b, i_kv, KV)
            _fill(v_box, pipes[2], i, t, n, masked, pad, kv_list, i_b, i_kv, KV)
            if t == 0:  # after the first keys, which need not wait for the output of the unit before
                for w in gl.static_range(TEAM):
                    mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), ROWS * q_smem.shape[2] * 2)
                    head, row0 = _rows(i_tile, i_h, w, PACK)
                    _copy_in(q_box, i_b, head, row0, q_full.index(w), q_smem.index(w), True)
            i += 1


@gluon.jit
def _rows(i_tile, i_h, w, PACK: gl.constexpr):
    """(head, first row) of consumer w: consumers are neighbouring heads (PACK > 1) or neighbouring rows."""
    if PACK > 1:
        return i_h + w, i_tile * ROWS
    else:
        return i_h, (i_tile * TEAM + w) * ROWS


@gluon.jit
def _keys(t, n, masked, pad, kv_list, kv_len, o_n, KV: gl.constexpr, PER: gl.constexpr):
    """(keys [BN] of a masked step, which of them count: none beyond the last key, none twice)."""
    o_key = o_n * 0
    seen = o_n < 0
    for part in gl.static_range(PER):
        first = gl.load(kv_list + _entry(t, part, n, masked, pad, PER)) * KV
        mine = o_n // KV == part
        o_key = gl.where(mine, first + o_n % KV, o_key)
        seen = seen | (mine & (o_key < kv_len) & (t * PER + part >= pad))
    return o_key, seen


@gluon.jit
def _team_step(
    t, i, n, masked, pad, kv_list, b_q, b_p, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2,
    KV: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """q k^T of this step and p v of the last one run while the softmax of this one is computed."""
    k_smem, k_full, k_empty = pipes[1]
    v_smem, v_full, v_empty = pipes[2]
    o_key, seen = o_n, o_n < 0
    if MASKED:
        o_key, seen = _keys(t, n, masked, pad, kv_list, kv_len, o_n, KV, k_smem.shape[1] // KV)
    b_s, b_acc = _begin_step(b_q, b_p, b_acc, zeros, k_smem, k_full, k_empty, v_smem, i)
    b_p, b_alpha, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale_log2, o_key, o_row, seen, MASKED)
    b_acc = _end_step(b_alpha, b_acc, v_smem, v_full, v_empty, i)
    return b_p, b_m, b_l, b_acc


@gluon.jit
def _consume(args, W: gl.constexpr, KV: gl.constexpr, PACK: gl.constexpr, STORE_LSE: gl.constexpr):
    o_box, lse, pipes, plan, edge, q_len, kv_len, scale_log2 = args
    q_smem, q_full, q_empty = pipes[0]
    v_smem, v_empty = pipes[2][0], pipes[2][2]
    BN: gl.constexpr = v_smem.shape[1]
    D: gl.constexpr = v_smem.shape[2]
    SV: gl.constexpr = v_smem.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    o_n = gl.arange(0, BN, gl.SliceLayout(0, S))
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    i = 0
    for turn in range(0, _turns(plan[2])):
        i_tile, i_b, i_h, _, n, kv_list = _place(turn, plan, PACK)
        steps, masked, pad = _steps(n, edge, BN // KV)
        i_h, row0 = _rows(i_tile, i_h, W, PACK)
        o_row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S)) + kv_len - q_len
        b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        b_l = gl.zeros([ROWS, 4], gl.float32, LANES)
        b_acc = gl.zeros([ROWS, D], gl.float32, O)
        mbarrier.wait(q_full.index(W), turn & 1)
        b_q = q_smem.index(W)
        b_p, b_m, b_l = _first_step(n, i, masked, pad, kv_list, b_q, b_m, b_l, zeros, pipes, o_n, o_row, kv_len, scale_log2, KV)
        i += 1
        for t in range(1, masked):
            b_p, b_m, b_l, b_acc = _team_step(
                t, i, n, masked, pad, kv_list, b_q, b_p, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2,
                KV, True,
            )  # fmt: skip
            i += 1
        for t in range(masked, steps):
            b_p, b_m, b_l, b_acc = _team_step(
                t, i, n, masked, pad, kv_list, b_q, b_p, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2,
                KV, False,
            )  # fmt: skip
            i += 1
        b_acc = warpgroup_mma(_operand(b_p, b_acc, v_smem), v_smem.index((i - 1) % SV), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(v_empty.index((i - 1) % SV), count=1)
        i_bh = i_b * plan[5] + i_h
        b_l = _row_sums(b_l, b_m)
        _store_out(b_acc, b_m, b_l, q_smem.index(W), o_box, lse, i_b, i_h, i_bh, row0, q_len, scale_log2, STORE_LSE)
        mbarrier.arrive(q_empty.index(W), count=1)


@gluon.jit
def _first_step(n, i, masked, pad, kv_list, b_q, b_m, b_l, zeros, pipes, o_n, o_row, kv_len, scale_log2, KV: gl.constexpr):
    """A turn's first step, which has no product with V of an earlier one."""
    k_smem, k_full, k_empty = pipes[1]
    v_smem, v_full = pipes[2][0], pipes[2][1]
    SV: gl.constexpr = v_smem.shape[0]
    o_key, seen = _keys(0, n, masked, pad, kv_list, kv_len, o_n, KV, k_smem.shape[1] // KV)
    b_s = warpgroup_mma_wait(0, deps=[_score(b_q, k_smem, k_full, i, zeros)])
    mbarrier.arrive(k_empty.index(i % k_smem.shape[0]), count=1)
    b_p, _, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale_log2, o_key, o_row, seen, True)
    mbarrier.wait(v_full.index(i % SV), i // SV & 1)
    return b_p, b_m, b_l


@gluon.jit(do_not_specialize=RUN_TIME)
def attention_team_kernel(
    q_box, k_box, v_box, o_box, lse, kv_num, kv_index,
    stride_mask_batch, heads, group, mask_heads, q_len, kv_len, tiles, width, edge, together, units, scale_log2,
    D: gl.constexpr, KV: gl.constexpr, BN: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
    PACK: gl.constexpr, STORE_LSE: gl.constexpr,
):  # fmt: skip
    """Two warpgroups of 64 rows over one list of blocks of KV keys, BN keys a step, fed by one warp.

    The rows are 128 neighbours of one head, or 64 rows of PACK = 2 heads that share a selection. With fewer
    programs than units of work each takes one of every num_programs.
    """
    dtype: gl.constexpr = q_box.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [TEAM, ROWS, D], TILE)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES_K, BN, D], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES_V, BN, D], TILE)
    q_full, q_empty = _barriers(TEAM, 1), _barriers(TEAM, 1)
    k_full, k_empty = _barriers(STAGES_K, 1), _barriers(STAGES_K, TEAM)
    v_full, v_empty = _barriers(STAGES_V, 1), _barriers(STAGES_V, TEAM)
    fence_async_shared()
    pipes = ((q_smem, q_full, q_empty), (k_smem, k_full, k_empty), (v_smem, v_full, v_empty))
    plan = (kv_num, kv_index, units, tiles, together, heads, group, stride_mask_batch, mask_heads, width)
    args = (o_box, lse, pipes, plan, edge, q_len, kv_len, scale_log2)
    gl.warp_specialize([
        (_consume, (args, 0, KV, PACK, STORE_LSE)),
        (_consume, (args, 1, KV, PACK, STORE_LSE)),
        (_produce, (q_box, k_box, v_box, pipes, plan, edge, KV, PACK)),
    ], [4, 1], [240, 24])  # fmt: skip
