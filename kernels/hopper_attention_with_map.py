"""Gluon kernel of attention_with_map (sm_90): a producer warp and two consumers of 64 neighbouring rows of one head."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from .hopper_attention import DTYPES, HEAD_DIMS, _box, heads_in_cache, on_hopper
from .hopper_kernels import (
    LANES,
    ROWS,
    _barriers,
    _begin_step,
    _copy_in,
    _end_step,
    _operand,
    _row_sums,
    _score,
    _store_out,
    _tile,
    _turns,
    _unit,
)
from .launch import LOG2E

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its names in Triton 3.9 and 3.6
OPTIONS = dict(BN=128, STAGES_K=3, STAGES_V=3, num_warps=4, maxnreg=168)  # one program a multiprocessor
TEAM_ROWS = 128  # of a program: two consumers
TEAM = gl.constexpr(TEAM_ROWS // 64)
PART = gl.constexpr(128)  # cells of the map that are read at a time
KEYS = gl.constexpr(64)  # of a cell


def hopper_applies(q: Tensor) -> bool:
    """Whether launch() computes this: a GPU of compute capability 9.0, fp16 or bf16, D 64 or 128."""
    return on_hopper(q) and q.dtype in DTYPES and q.shape[-1] in HEAD_DIMS


@gluon.jit
def _place(turn, plan, BN: gl.constexpr):
    """(tile, batch, head, key of its first row, steps of BN keys, how many of them are masked)."""
    units, tiles, together, heads, _group, q_len, kv_len = plan
    i_tile, i_bh = _tile(_unit(turn), units, tiles, together)
    first_row = i_tile * (TEAM * ROWS) + kv_len - q_len
    steps = gl.cdiv(gl.minimum(first_row + TEAM * ROWS, kv_len), BN)
    return i_tile, i_bh // heads, i_bh % heads, first_row, steps, steps - (first_row + 1) // BN


@gluon.jit
def _fill(box, smem, full, empty, i, i_b, i_kv, token):
    """The i-th keys or values of the producer, once both consumers have released their slot."""
    STAGES: gl.constexpr = smem.shape[0]
    slot = i % STAGES
    mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(slot), smem.shape[1] * smem.shape[2] * 2)
    _copy_in(box, i_b, i_kv, token, full.index(slot), smem.index(slot), True)


@gluon.jit
def _produce(q_box, k_box, v_box, ring, plan):
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = ring
    BN: gl.constexpr = k_smem.shape[1]
    i = 0
    for turn in range(0, _turns(plan[0])):
        i_tile, i_b, i_h, _first_row, steps, _masked = _place(turn, plan, BN)
        i_kv = i_h // plan[4]
        for t in range(0, steps):
            token = (steps - 1 - t) * BN
            _fill(k_box, k_smem, k_full, k_empty, i, i_b, i_kv, token)
            if t == 0:
                for w in gl.static_range(TEAM):
                    mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), ROWS * q_smem.shape[2] * 2)
                    _copy_in(q_box, i_b, i_h, (i_tile * TEAM + w) * ROWS, q_full.index(w), q_smem.index(w), True)
            _fill(v_box, v_smem, v_full, v_empty, i, i_b, i_kv, token)
            i += 1


@gluon.jit
def _softmax_step(
    b_s, b_m, b_l, token, o_n, o_row, kv_len, slots, slot_tiles, scale_log2, OF: gl.constexpr, MASKED: gl.constexpr
):
    """One step of the online softmax; of every row and cell the largest logit (or the binary log of the sum of exponentials)
    goes to slots. Returns probabilities, the factor of the old sums, the new maximum, the new sum."""
    CELLS: gl.constexpr = b_s.shape[1] // KEYS
    if MASKED:
        o_key = token + o_n
        b_s = gl.where((o_key < kv_len)[None, :] & (o_key[None, :] <= o_row[:, None]), b_s, float("-inf"))
    # [64, CELLS]
    b_top = gl.max(b_s.reshape([ROWS, CELLS, KEYS]), 2)
    b_m_new = gl.maximum(b_m, gl.convert_layout(gl.max(b_top, 1), b_m.type.layout))
    b_base = b_m_new * scale_log2
    if MASKED:
        b_base = gl.where(b_m_new == float("-inf"), 0.0, b_base)
    b_alpha = gl.exp2(b_m * scale_log2 - b_base)
    b_p = gl.exp2(b_s * scale_log2 - b_base[:, None])
    L: gl.constexpr = b_top.type.layout
    # [64, CELLS, 4]: what each of the four threads of a row adds up
    b_sums = gl.sum(gl.sum(b_p.reshape([ROWS, CELLS, KEYS // 8, 4, 2]), 4), 2)
    if OF != "max":
        b_seen = gl.convert_layout(gl.log2(gl.sum(b_sums, 2)), L)
        b_seen += gl.convert_layout(b_base, gl.SliceLayout(1, L))[:, None]
    else:
        b_seen = b_top  # scaled when it is read
    first = token // KEYS
    o_c = gl.arange(0, CELLS, gl.SliceLayout(0, L))
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    kept = (o_c < slot_tiles - first)[None, :] & (o_r >= 0)[:, None]
    gl.store(slots + first * (TEAM * ROWS) + (o_c[None, :] * (TEAM * ROWS) + o_r[:, None]), b_seen, mask=kept)
    b_alpha_4 = gl.convert_layout(b_alpha, gl.SliceLayout(1, LANES), assert_trivial=True)
    b_sum = gl.convert_layout(gl.sum(b_sums, 1), LANES, assert_trivial=True)
    return b_p, b_alpha, b_m_new, b_l * b_alpha_4[:, None] + b_sum


@gluon.jit
def _step(
    i, token, b_q, b_p, b_m, b_l, b_acc, zeros, ring, o_n, o_row, kv_len, slots, slot_tiles, scale_log2,
    OF: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """q k^T of this step and p v of the last one run while the softmax of this one is computed. b_p goes from step to step in
    fp32: two loops in a row would unpack and pack 16-bit numbers in every step."""
    _q_smem, k_smem, v_smem, _q_full, _q_empty, k_full, k_empty, v_full, v_empty = ring
    b_s, b_acc = _begin_step(b_q, b_p, b_acc, zeros, k_smem, k_full, k_empty, v_smem, i)
    b_p, b_alpha, b_m, b_l = _softmax_step(
        b_s, b_m, b_l, token, o_n, o_row, kv_len, slots, slot_tiles, scale_log2, OF, MASKED
    )  # fmt: skip
    b_acc = _end_step(b_alpha, b_acc, v_smem, v_full, v_empty, i)
    return b_p, b_m, b_l, b_acc


@gluon.jit
def _store_map(b_m, b_l, slots, p_row, row0, q_len, remembered, scale_log2, OF: gl.constexpr):
    """One row of cells, from what the row's steps have left in slots."""
    E: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    o_r = gl.arange(0, ROWS, gl.SliceLayout(0, E))
    b_lse = gl.convert_layout(b_m * scale_log2 + gl.log2(b_l), gl.SliceLayout(0, E))
    b_lse = gl.where(row0 + o_r < q_len, b_lse, float("inf"))  # rows after the last query hold no probability
    _barrier()  # other threads of this warpgroup wrote what is read next
    for c in range(0, remembered, PART):
        o_c = c + gl.arange(0, PART, gl.SliceLayout(1, E))
        held = (o_c < remembered)[:, None] & (o_r >= 0)[None, :]
        # [PART, 64]
        b_seen = gl.load(slots + o_c[:, None] * (TEAM * ROWS) + o_r[None, :], mask=held, other=float("-inf"))
        if OF == "mass":
            b_cell = gl.sum(gl.exp2(b_seen - b_lse[None, :]), 1)
        else:
            SCALED: gl.constexpr = OF == "row_mass"
            b_cell = gl.exp2(gl.max((b_seen if SCALED else b_seen * scale_log2) - b_lse[None, :], 1))
        gl.store(p_row + o_c, b_cell, mask=(o_c < remembered) & (row0 < q_len))
    _barrier()  # the next unit writes into slots


@gluon.jit
def _consume(
    o_box, lse, cells, slots, ring, plan, width, slot_tiles, scale_log2, W: gl.constexpr, OF: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = ring
    units, _tiles, _together, heads, _group, q_len, kv_len = plan
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    SK: gl.constexpr = k_smem.shape[0]
    SV: gl.constexpr = v_smem.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    slots += gl.program_id(0).to(gl.int64) * slot_tiles * (TEAM * ROWS) + W * ROWS
    o_n = gl.arange(0, BN, gl.SliceLayout(0, S))
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    b_q = q_smem.index(W)
    i = 0
    for turn in range(0, _turns(units)):
        i_tile, i_b, i_h, first_row, steps, masked = _place(turn, plan, BN)
        o_row = first_row + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
        b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        b_l = gl.zeros([ROWS, 4], gl.float32, LANES)
        b_acc = gl.zeros([ROWS, D], gl.float32, O)
        mbarrier.wait(q_full.index(W), turn & 1)
        b_s = warpgroup_mma_wait(0, deps=[_score(b_q, k_smem, k_full, i, zeros)])
        mbarrier.arrive(k_empty.index(i % SK), count=1)
        b_p, _b_alpha, b_m, b_l = _softmax_step(
            b_s, b_m, b_l, (steps - 1) * BN, o_n, o_row, kv_len, slots, slot_tiles, scale_log2, OF, True
        )  # fmt: skip
        mbarrier.wait(v_full.index(i % SV), i // SV & 1)
        i += 1
        for t in range(1, masked):
            b_p, b_m, b_l, b_acc = _step(
                i, (steps - 1 - t) * BN, b_q, b_p, b_m, b_l, b_acc, zeros, ring, o_n, o_row, kv_len, slots, slot_tiles,
                scale_log2, OF, True,
            )  # fmt: skip
            i += 1
        for t in range(masked, steps):
            b_p, b_m, b_l, b_acc = _step(
                i, (steps - 1 - t) * BN, b_q, b_p, b_m, b_l, b_acc, zeros, ring, o_n, o_row, kv_len, slots, slot_tiles,
                scale_log2, OF, False,
            )  # fmt: skip
            i += 1
        b_acc = warpgroup_mma(_operand(b_p, b_acc, v_smem), v_smem.index((i - 1) % SV), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(v_empty.index((i - 1) % SV), count=1)
        i_bh = i_b * heads + i_h
        row0 = (i_tile * TEAM + W) * ROWS
        b_l = _row_sums(b_l, b_m)
        _store_out(b_acc, b_m, b_l, q_smem.index(W), o_box, lse, i_b, i_h, i_bh, row0, q_len, scale_log2, True)
        mbarrier.arrive(q_empty.index(W), count=1)
        p_row = cells + (i_bh.to(gl.int64) * gl.cdiv(q_len, ROWS) + row0 // ROWS) * width
        end = gl.cdiv(gl.minimum(first_row + (W + 1) * ROWS, kv_len), KEYS)
        _store_map(b_m, b_l, slots, p_row, row0, q_len, gl.minimum(end, slot_tiles), scale_log2, OF)


@gluon.jit(do_not_specialize=["units", "tiles", "q_len", "kv_len", "width", "slot_tiles"])
def hopper_attention_with_map_kernel(
    q_box, k_box, v_box, o_box, lse, cells, slots,
    units, tiles, together, heads, group, q_len, kv_len, width, slot_tiles, scale_log2,
    D: gl.constexpr, BN: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, OF: gl.constexpr,
):  # fmt: skip
    """As attention_with_map_fwd_kernel; keys are walked from the last to the first, so that the masked ones come first."""
    dtype: gl.constexpr = q_box.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [TEAM, ROWS, D], TILE)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES_K, BN, D], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES_V, BN, D], TILE)
    q_full, q_empty = _barriers(TEAM, 1), _barriers(TEAM, 1)
    k_full, k_empty = _barriers(STAGES_K, 1), _barriers(STAGES_K, TEAM)
    v_full, v_empty = _barriers(STAGES_V, 1), _barriers(STAGES_V, TEAM)
    fence_async_shared()
    ring = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    plan = (units, tiles, together, heads, group, q_len, kv_len)
    gl.warp_specialize([
        (_consume, (o_box, lse, cells, slots, ring, plan, width, slot_tiles, scale_log2, 0, OF)),
        (_consume, (o_box, lse, cells, slots, ring, plan, width, slot_tiles, scale_log2, 1, OF)),
        (_produce, (q_box, k_box, v_box, ring, plan)),
    ], [4, 1], [240, 24])  # fmt: skip


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cells: Tensor, slots: Tensor, scale: float, of: str
) -> None:
    """Fills out, lse and the cells of the first slots.shape[1] key tiles; slots: fp32 [programs, key tiles, 128] of scratch."""
    batch, heads, q_len, dim = q.shape
    tiles, keys = -(-q_len // TEAM_ROWS), OPTIONS["BN"]
    together = heads_in_cache(q, k)
    hopper_attention_with_map_kernel[(slots.shape[0],)](
        _box(q, 64, dim), _box(k, keys, dim), _box(v, keys, dim), _box(out, 64, dim), lse, cells, slots,
        tiles * batch * heads, tiles, together, heads, heads // k.shape[1], q_len, k.shape[2], cells.shape[3], slots.shape[1],
        scale * LOG2E, D=dim, OF=of, **OPTIONS,
    )  # fmt: skip
