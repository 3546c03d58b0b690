"""Gluon kernels of hopper_attention.py (sm_90): tensor memory copies, mbarriers and asynchronous warpgroup products by hand.

Every warpgroup computes 64 query rows. A list of blocks is walked from its end, the masked edge first, then from its start.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Gluon is experimental and renames: the first names are those of Triton 3.9, the others those of 3.6.
RENAMED = gl.constexpr(hasattr(tma, "async_load"))
_load = tma.async_load if RENAMED.value else tma.async_copy_global_to_shared
_store = tma.async_store if RENAMED.value else tma.async_copy_shared_to_global
ROWS = gl.constexpr(64)
# The four threads of each of 64 rows of a warpgroup's products.
LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
LN2 = gl.constexpr(0.6931471805599453)
# Sizes that differ from call to call without a gain from code of their own.
RUN_TIME = ("stride_mask_batch", "heads", "group", "mask_heads", "q_len", "kv_len", "tiles", "width", "units")


@gluon.jit
def _boxes(smem, box, N: gl.constexpr):
    """A tile of smem as the N boxes [1, 1, rows, channels] that it consists of."""
    TOKENS: gl.constexpr = box.block_shape[2]
    COLUMNS: gl.constexpr = box.block_shape[3]
    if RENAMED:
        return smem.reinterpret(box.dtype, [N, 1, 1, TOKENS, COLUMNS], box.layout)
    else:
        return smem._reinterpret(box.dtype, [N, 1, 1, TOKENS, COLUMNS], box.layout)


@gluon.jit
def _copy_in(box, i_b, i_h, token, full, smem, pred):
    """The tokens of one box [1, 1, N, D] to smem [N, D]."""
    _load(box, [i_b, i_h, token, 0], full, _boxes(smem, box, 1).index(0), pred=pred)


@gluon.jit
def _softmax_step(b_s, b_m, b_l, scale_log2, o_key, o_row, seen, MASKED: gl.constexpr):
    """(probabilities [64, BN], factor of the old sums [64], new maximum [64], new sums [64, 4]) of one step.

    The four threads that hold a row of logits add up their own part of it: _row_sums adds up the sums.
    """
    if MASKED:
        b_s = gl.where(seen[None, :] & (o_key[None, :] <= o_row[:, None]), b_s, float("-inf"))
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1))
    b_base = b_m_new * scale_log2
    if MASKED:
        b_base = gl.where(b_m_new == float("-inf"), 0.0, b_base)
    b_alpha = gl.exp2(b_m * scale_log2 - b_base)
    # The running maximum stays unscaled so that the scale folds into one multiply-add per logit.
    b_p = gl.exp2(b_s * scale_log2 - b_base[:, None])
    b_alpha_4 = gl.convert_layout(b_alpha, gl.SliceLayout(1, LANES), assert_trivial=True)
    b_sum = gl.sum(gl.sum(b_p.reshape([ROWS, b_p.shape[1] // 8, 4, 2]), 3), 1)
    return b_p, b_alpha, b_m_new, b_l * b_alpha_4[:, None] + gl.convert_layout(b_sum, LANES, assert_trivial=True)


@gluon.jit
def _row_sums(b_l, b_m):
    return gl.convert_layout(gl.sum(b_l, 1), b_m.type.layout)


@gluon.jit
def _operand(b_p, b_acc, smem):
    """Probabilities in fp32 as the first operand of their product with the values in smem."""
    return gl.convert_layout(b_p.to(smem.dtype), gl.DotOperandLayout(0, b_acc.type.layout, 2))


@gluon.jit
def _begin_step(b_q, b_p, b_acc, zeros, k_smem, k_full, k_empty, v_smem, i):
    """(q k^T of step i, p v of step i - 1, still under way).

    Probabilities pass from step to step in fp32: in 16 bits every step would unpack and pack them.
    """
    b_s = _score(b_q, k_smem, k_full, i, zeros)
    b_acc = warpgroup_mma(_operand(b_p, b_acc, v_smem), v_smem.index((i - 1) % v_smem.shape[0]), b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(k_empty.index(i % k_smem.shape[0]), count=1)
    return b_s, b_acc


@gluon.jit
def _end_step(b_alpha, b_acc, v_smem, v_full, v_empty, i):
    """The accumulator to add p v of step i to."""
    STAGES: gl.constexpr = v_smem.shape[0]
    # Between softmax and the next wait: without it ptxas waits for p v before the softmax.
    mbarrier.wait(v_full.index(i % STAGES), i // STAGES & 1)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    mbarrier.arrive(v_empty.index((i - 1) % STAGES), count=1)
    return b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]


@gluon.jit
def _store_out(b_acc, b_m, b_l, smem, o_box, lse, i_b, i_h, i_bh, row0, q_len, scale_log2, STORE_LSE: gl.constexpr):
    """Output rows through smem [64, D], which nothing reads any more; returns when smem may be written again."""
    b_inv = gl.convert_layout(1.0 / b_l, gl.SliceLayout(1, b_acc.type.layout))
    smem.store((b_acc * b_inv[:, None]).to(o_box.dtype))
    fence_async_shared()
    _store(o_box, [i_b, i_h, row0, 0], _boxes(smem, o_box, 1).index(0))
    if STORE_LSE:
        o_m = row0 + gl.arange(0, ROWS, b_m.type.layout)
        b_lse = (b_m * scale_log2 + gl.log2(b_l)) * LN2
        gl.store(lse + i_bh.to(gl.int64) * q_len + o_m, b_lse, mask=o_m < q_len)
    tma.store_wait(0)


@gluon.jit
def _barriers(N: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _first_key(kv_index, at, width, BN: gl.constexpr, KV: gl.constexpr):
    """First key of the at-th tile of BN keys of a list of blocks of KV keys; any tile for one beyond the list."""
    at = gl.minimum(at, width * (KV // BN) - 1)
    return gl.load(kv_index + at // (KV // BN)) * KV + at % (KV // BN) * BN


@gluon.jit
def _unit(turn):
    """The unit of work of this program's turn, every second turn in reverse order: units come in order of their length."""
    last = gl.num_programs(0) - 1
    return turn * (last + 1) + gl.where(turn % 2 == 1, last - gl.program_id(0), gl.program_id(0))


@gluon.jit
def _tile(unit, units, tiles, together):
    """(tile of query rows, heads or packs of them before it) of a unit of work; `together` heads take turns.

    Long rows come first or, where a program takes several units, last in every second group of heads: _unit gives every
    program as much only where lengths change without a jump.
    """
    group = unit // (tiles * together)
    in_group = unit % (tiles * together)
    i = in_group // together
    falls = (gl.num_programs(0) >= units) | ((units // (tiles * together) - 1 - group) % 2 == 0)
    return gl.where(falls, tiles - 1 - i, i), group * together + in_group % together


@gluon.jit
def _turns(units):
    whole = units // gl.num_programs(0)
    return whole + (_unit(whole) < units).to(gl.int32)


@gluon.jit
def _score(b_q, smem, full, i, zeros):
    """q k^T of a consumer's i-th step, under way."""
    STAGES: gl.constexpr = smem.shape[0]
    mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
    return warpgroup_mma(b_q, smem.index(i % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _solo_step(
    i, n, edge, b_q, b_m, b_l, b_acc, zeros, slot, phase, k_smem, v_smem, k_full, v_full, k_box, v_box, kv_index,
    i_b, i_kv, width, o_n, o_row, kv_len, scale_log2, KV: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    BN: gl.constexpr = k_smem.shape[1]
    BYTES: gl.constexpr = BN * k_smem.shape[2] * 2
    ahead = i + STAGES
    first = _first_key(kv_index, gl.where(ahead < edge, n - 1 - ahead, ahead - edge), width, BN, KV)
    o_key = o_n
    if MASKED:
        o_key = o_n + _first_key(kv_index, n - 1 - i, width, BN, KV)
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.expect(k_full.index(slot), BYTES, pred=ahead < n)
    b_s = warpgroup_mma(b_q, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    _copy_in(k_box, i_b, i_kv, first, k_full.index(slot), k_smem.index(slot), ahead < n)
    b_p, b_alpha, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale_log2, o_key, o_row, o_key < kv_len, MASKED)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_acc.type.layout))[:, None]
    b_p = _operand(b_p, b_acc, v_smem)
    mbarrier.wait(v_full.index(slot), phase)
    mbarrier.expect(v_full.index(slot), BYTES, pred=ahead < n)
    b_acc = warpgroup_mma(b_p, v_smem.index(slot), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    _copy_in(v_box, i_b, i_kv, first, v_full.index(slot), v_smem.index(slot), ahead < n)
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return b_m, b_l, b_acc, slot, phase


@gluon.jit(do_not_specialize=[*RUN_TIME[:-1], "edge"])
def attention_solo_kernel(
    q_box, k_box, v_box, o_box, lse, kv_num, kv_index,
    stride_mask_batch, heads, group, mask_heads, q_len, kv_len, tiles, width, edge, together, scale_log2,
    D: gl.constexpr, Q_BLOCK: gl.constexpr, KV: gl.constexpr, STAGES: gl.constexpr, Q_IN_REGS: gl.constexpr,
    STORE_LSE: gl.constexpr,
):  # fmt: skip
    """One program: one warpgroup, 64 rows of one head, no producer. Programs that share a multiprocessor hide its waits.

    Blocks of Q_BLOCK rows and KV keys are computed in `tiles` of 64 rows and in tiles of 64 keys, `edge` of them masked.

    A copy is issued as soon as the product that read its buffer is done; mbarrier phases count how often a slot was filled.
    With Q_IN_REGS q passes through the last buffer of V, which is filled afterwards.
    """
    dtype: gl.constexpr = q_box.dtype
    BN: gl.constexpr = 64
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BYTES: gl.constexpr = BN * D * 2
    i_tile = tiles - 1 - gl.program_id(0) // together  # long rows first
    i_bh = gl.program_id(1) * together + gl.program_id(0) % together
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_kv = i_h // group
    i_mask = (i_b * stride_mask_batch + i_h // (heads // mask_heads)) * gl.cdiv(q_len, Q_BLOCK) + i_tile * ROWS // Q_BLOCK
    kv_index += i_mask.to(gl.int64) * width
    n = gl.load(kv_num + i_mask) * (KV // BN)
    if Q_BLOCK > ROWS:  # what the row's last block holds after the last of these queries; an earlier block holds nothing
        end = gl.minimum((i_tile + 1) * ROWS + kv_len - q_len, kv_len)
        last = gl.load(kv_index + n // (KV // BN) - 1) * KV
        n -= KV // BN - gl.maximum(gl.minimum(gl.cdiv(end - last, BN), KV // BN), 0)
    edge = gl.minimum(edge, n)

    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], TILE)
    q_smem = v_smem.index(STAGES - 1) if Q_IN_REGS else gl.allocate_shared_memory(dtype, [ROWS, D], TILE)
    q_full, k_full, v_full = _barriers(1, 1), _barriers(STAGES, 1), _barriers(STAGES, 1)
    fence_async_shared()

    mbarrier.expect(q_full.index(0), ROWS * D * 2)
    _copy_in(q_box, i_b, i_h, i_tile * ROWS, q_full.index(0), q_smem, True)
    first = 0
    for s in gl.static_range(STAGES):
        first = _first_key(kv_index, gl.where(s < edge, n - 1 - s, s - edge), width, BN, KV)
        mbarrier.expect(k_full.index(s), BYTES, pred=s < n)
        _copy_in(k_box, i_b, i_kv, first, k_full.index(s), k_smem.index(s), s < n)
        if s < STAGES - 1 or not Q_IN_REGS:
            mbarrier.expect(v_full.index(s), BYTES, pred=s < n)
            _copy_in(v_box, i_b, i_kv, first, v_full.index(s), v_smem.index(s), s < n)
    mbarrier.wait(q_full.index(0), 0)
    if Q_IN_REGS:
        b_q = q_smem.load(gl.DotOperandLayout(0, S, 2))
        fence_async_shared()
        mbarrier.expect(v_full.index(STAGES - 1), BYTES, pred=n >= STAGES)
        _copy_in(v_box, i_b, i_kv, first, v_full.index(STAGES - 1), v_smem.index(STAGES - 1), n >= STAGES)
    else:
        b_q = q_smem

    o_row = i_tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S)) + kv_len - q_len
    o_n = gl.arange(0, BN, gl.SliceLayout(0, S))
    b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    b_l = gl.zeros([ROWS, 4], gl.float32, LANES)
    b_acc = gl.zeros([ROWS, D], gl.float32, O)
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    slot = 0
    phase = 0
    for i in range(0, edge):
        b_m, b_l, b_acc, slot, phase = _solo_step(
            i, n, edge, b_q, b_m, b_l, b_acc, zeros, slot, phase, k_smem, v_smem, k_full, v_full, k_box, v_box, kv_index,
            i_b, i_kv, width, o_n, o_row, kv_len, scale_log2, KV, STAGES, True,
        )  # fmt: skip
    for i in range(edge, n):
        b_m, b_l, b_acc, slot, phase = _solo_step(
            i, n, edge, b_q, b_m, b_l, b_acc, zeros, slot, phase, k_smem, v_smem, k_full, v_full, k_box, v_box, kv_index,
            i_b, i_kv, width, o_n, o_row, kv_len, scale_log2, KV, STAGES, False,
        )  # fmt: skip
    b_l = _row_sums(b_l, b_m)
    _store_out(b_acc, b_m, b_l, k_smem.index(0), o_box, lse, i_b, i_h, i_bh, i_tile * ROWS, q_len, scale_log2, STORE_LSE)
