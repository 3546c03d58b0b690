"""The kernel of hopper_attention.py in which neighbouring rows with lists of their own share the blocks common to them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_kernels import LANES, ROWS, RUN_TIME, _barriers, _copy_in, _row_sums, _softmax_step, _store_out, _turns, _unit


@triton.jit
def union_lists_kernel(num, index, union_num, union, tiles, groups, width, union_width, TEAM: tl.constexpr, NB: tl.constexpr):
    """One program: the lists of TEAM neighbouring rows of one head."""
    i_group = tl.program_id(0)
    o_block = tl.arange(0, NB)
    b_rows = tl.zeros([NB], tl.int32)
    for w in tl.static_range(TEAM):
        i_tile = i_group % groups * TEAM + w
        i_row = (i_group // groups * tiles + i_tile).to(tl.int64)
        n = tl.load(num + i_row, mask=i_tile < tiles, other=0)
        b_listed = tl.load(index + i_row * width + o_block, mask=o_block < n, other=0)
        b_rows |= tl.histogram(b_listed, NB, mask=o_block < n) << w
    b_any = (b_rows > 0).to(tl.int32)
    n = tl.sum(b_any, 0)
    p_union = union + i_group.to(tl.int64) * union_width + n - tl.cumsum(b_any, 0)
    tl.store(p_union, (o_block << TEAM) | b_rows, mask=b_any > 0)
    tl.store(union_num + i_group, n)


def union_lists(num: Tensor, index: Tensor, blocks: int, team: int) -> tuple[Tensor, Tensor]:
    """Every block that one of `team` neighbouring rows lists, the last one first: block << team | bit w: row w lists it.

    Args: num [B, H, NQ] and index [B, H, NQ, K] of a BlockMask, contiguous int32;  blocks: blocks of keys.
    Returns: how many [B, H, NG], and they [B, H, NG, min(team * K, blocks)], int32, NG = ceil(NQ / team); undefined after the
    last.
    """
    batch, heads, tiles, width = index.shape
    groups, union_width = -(-tiles // team), min(team * width, blocks)
    union_num = torch.empty(batch, heads, groups, dtype=torch.int32, device=num.device)
    union = torch.empty(batch, heads, groups, union_width, dtype=torch.int32, device=num.device)
    union_lists_kernel[(union_num.numel(),)](
        num, index, union_num, union, tiles, groups, width, union_width, TEAM=team, NB=triton.next_power_of_2(blocks),
        num_warps=4 if blocks > 256 else 1,
    )  # fmt: skip
    return union_num, union


@gluon.jit
def _place(turn, plan):
    """(group of rows, batch, query head, KV head, mask's list, size of its union, union) of a turn's unit; long rows first."""
    union_num, union, groups, together, heads, group, stride_mask_batch, mask_heads, width = plan
    work = _unit(turn)
    in_groups = work % (groups * together)
    i_group = groups - 1 - in_groups // together
    i_bh = work // (groups * together) * together + in_groups % together
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_list = i_b * stride_mask_batch + i_h // (heads // mask_heads)
    i_union = i_list * groups + i_group
    return i_group, i_b, i_h, i_h // group, i_list, gl.load(union_num + i_union), union + i_union.to(gl.int64) * width


@gluon.jit
def _produce(q_box, k_box, v_box, pipes, plan, units):
    q_smem, q_full, q_empty, k_smem, v_smem, full, empty = pipes
    TEAM: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    i = 0
    for turn in range(0, _turns(units)):
        i_group, i_b, i_h, i_kv, _, n, union = _place(turn, plan)
        entry = gl.load(union)
        for j in range(0, n):
            slot = i % STAGES
            first = (entry >> TEAM) * BN
            entry = gl.load(union + gl.minimum(j + 1, n - 1))  # read one step early
            mbarrier.wait(empty.index(slot), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BN * D * 2)
            _copy_in(k_box, i_b, i_kv, first, full.index(slot), k_smem.index(slot), True)
            _copy_in(v_box, i_b, i_kv, first, full.index(slot), v_smem.index(slot), True)
            if j == 0:  # after the first keys, which need not wait for the output of the unit before
                for w in gl.static_range(TEAM):
                    mbarrier.wait(q_empty.index(w), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), ROWS * D * 2)
                    _copy_in(q_box, i_b, i_h, (i_group * TEAM + w) * ROWS, q_full.index(w), q_smem.index(w), True)
            i += 1


@gluon.jit
def _pass_by(i, full, empty):
    """Releases a block that another row lists. Not before it is there: an arrival counts for the phase that is open."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(i % STAGES), i // STAGES & 1)
    mbarrier.arrive(empty.index(i % STAGES), count=1)


@gluon.jit
def _union_step(
    i, end, entry, union, b_q, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2,
    W: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The next block of this row. `entry` is at union + i, i counts the blocks that the producer loads, up to `end`."""
    q_smem, _, _, k_smem, v_smem, full, empty = pipes
    TEAM: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    O: gl.constexpr = b_acc.type.layout
    while ((entry >> W) & 1) == 0:
        ahead = gl.load(union + i + 1)
        _pass_by(i, full, empty)
        i += 1
        entry = ahead
    o_key = (entry >> TEAM) * k_smem.shape[1] + o_n
    entry = gl.load(union + gl.minimum(i + 1, end - 1))
    slot = i % STAGES
    mbarrier.wait(full.index(slot), i // STAGES & 1)
    b_s = warpgroup_mma(b_q, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    b_p, b_alpha, b_m, b_l = _softmax_step(b_s, b_m, b_l, scale_log2, o_key, o_row, o_key < kv_len, MASKED)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, O))[:, None]
    b_p = gl.convert_layout(b_p.to(q_smem.dtype), gl.DotOperandLayout(0, O, 2))
    b_acc = warpgroup_mma(b_p, v_smem.index(slot), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_acc])
    mbarrier.arrive(empty.index(slot), count=1)
    return i + 1, entry, b_m, b_l, b_acc


@gluon.jit
def _consume(args, W: gl.constexpr, Q_IN_REGS: gl.constexpr, STORE_LSE: gl.constexpr):
    o_box, lse, kv_num, pipes, plan, units, tiles, edge, q_len, kv_len, scale_log2 = args
    q_smem, q_full, q_empty, k_smem, _v_smem, full, empty = pipes
    TEAM: gl.constexpr = q_smem.shape[0]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    o_n = gl.arange(0, BN, gl.SliceLayout(0, S))
    zeros = gl.zeros([ROWS, BN], gl.float32, S)
    i = 0
    for turn in range(0, _turns(units)):
        i_group, i_b, i_h, _i_kv, i_list, n_union, union = _place(turn, plan)
        i_tile = i_group * TEAM + W
        n = gl.load(kv_num + i_list * tiles + i_tile, mask=i_tile < tiles, other=0)
        row0 = i_tile * ROWS
        o_row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S)) + kv_len - q_len
        b_m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        b_l = gl.zeros([ROWS, 4], gl.float32, LANES)
        b_acc = gl.zeros([ROWS, D], gl.float32, O)
        end = i + n_union
        entry = gl.load(union)
        union -= i
        mbarrier.wait(q_full.index(W), turn & 1)
        b_q = q_smem.index(W)
        if Q_IN_REGS:
            b_q = b_q.load(gl.DotOperandLayout(0, S, 2))
        masked = gl.minimum(edge, n)
        for _t in range(0, masked):
            i, entry, b_m, b_l, b_acc = _union_step(
                i, end, entry, union, b_q, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2, W, True
            )
        for _t in range(masked, n):
            i, entry, b_m, b_l, b_acc = _union_step(
                i, end, entry, union, b_q, b_m, b_l, b_acc, zeros, pipes, o_n, o_row, kv_len, scale_log2, W, False
            )
        while i < end:
            _pass_by(i, full, empty)
            i += 1
        i_bh = i_b * plan[4] + i_h
        b_l = _row_sums(b_l, b_m)
        _store_out(b_acc, b_m, b_l, q_smem.index(W), o_box, lse, i_b, i_h, i_bh, row0, q_len, scale_log2, STORE_LSE)
        mbarrier.arrive(q_empty.index(W), count=1)


@gluon.jit(do_not_specialize=[*RUN_TIME, "groups"])
def attention_union_kernel(
    q_box, k_box, v_box, o_box, lse, kv_num, union_num, union,
    stride_mask_batch, heads, group, mask_heads, q_len, kv_len, tiles, groups, width, edge, together, units, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, TEAM: gl.constexpr, Q_IN_REGS: gl.constexpr, STORE_LSE: gl.constexpr,
):  # fmt: skip
    """TEAM warpgroups of 64 neighbouring rows each, fed by one warp with the union of their lists of blocks of 64 keys.

    Each computes the blocks that its own row lists and passes by the others. With fewer programs than units of work each
    takes one of every num_programs.
    """
    dtype: gl.constexpr = q_box.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [TEAM, ROWS, D], TILE)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], TILE)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], TILE)
    q_full, q_empty, full, empty = _barriers(TEAM, 1), _barriers(TEAM, 1), _barriers(STAGES, 1), _barriers(STAGES, TEAM)
    fence_async_shared()
    pipes = (q_smem, q_full, q_empty, k_smem, v_smem, full, empty)
    plan = (union_num, union, groups, together, heads, group, stride_mask_batch, mask_heads, width)
    args = (o_box, lse, kv_num, pipes, plan, units, tiles, edge, q_len, kv_len, scale_log2)
    if TEAM == 2:
        gl.warp_specialize([
            (_consume, (args, 0, Q_IN_REGS, STORE_LSE)),
            (_consume, (args, 1, Q_IN_REGS, STORE_LSE)),
            (_produce, (q_box, k_box, v_box, pipes, plan, units)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (args, 0, Q_IN_REGS, STORE_LSE)),
            (_consume, (args, 1, Q_IN_REGS, STORE_LSE)),
            (_consume, (args, 2, Q_IN_REGS, STORE_LSE)),
            (_produce, (q_box, k_box, v_box, pipes, plan, units)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
