"""Vertical and slash lines -> blocks and single columns: op, reference, Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_mask import BlockMask
from .launch import runs_triton

BLOCK = 64


def vertical_slash_mask(
    vertical: Tensor, slash: Tensor, max_vertical: int, max_slash: int, q_len: int, impl: str = "auto"
) -> BlockMask:
    """BlockMask of 64-wide key blocks that cover the slashes, plus the verticals outside them as single columns.

    A slash d reaches the 64 queries that end before token `end` through the keys [p - 64, p), p = max(end - d, 64). From the
    farthest slash to the nearest: one whose p lies more than 64 past the covered range opens a new block [p - 64, p); one
    nearer than that, but not covered, extends the range by a whole 64 keys, which may overshoot p by up to 63. Slashes as
    far as `end` or farther do not reach the row, and verticals after its last block are dropped.

    Source: MInference (Jiang et al. 2024, arXiv 2407.02490), Algorithm 2 and appendix C.4, as its CUDA conversion runs.

    Args:
        vertical: bool [B, H, kv_len], the chosen key columns.
        slash: bool [B, H, kv_len], the chosen distances i - j; one below 64 must be chosen in every head, so that every
            query sees a key.
        max_vertical, max_slash: upper bounds on how many are chosen in a head; they size the result without a sync.
        q_len: tokens; the last query sits at the last key.
        impl: "auto" (Triton on CUDA) | "triton" | "reference".

    Returns: BlockMask with q_block = kv_block = 64 and kv_step = 1. Raises: ValueError for an unknown impl.
    """
    kv_len = vertical.shape[-1]
    rows = -(-q_len // BLOCK)
    follow = _follow(slash, kv_len + BLOCK)
    # Blocks of a row do not overlap and end before end + 64, and each covers at least one slash.
    width = min(-(-(kv_len + BLOCK) // BLOCK), max_slash)
    key = torch.arange(kv_len, dtype=torch.int32, device=vertical.device)
    columns = key.where(vertical, kv_len).sort(dim=-1).values[..., :max_vertical].contiguous()
    convert = _convert_triton if runs_triton(impl, vertical.is_cuda) else vertical_slash_reference
    num, index, column_num, column_index = convert(follow, columns, q_len, kv_len, rows, width)
    return BlockMask(
        num, index, q_len, kv_len, BLOCK, BLOCK, column_index, column_num, kv_step=1, trusted=True
    )  # fmt: skip


def _follow(slash: Tensor, length: int) -> Tensor:
    """The step from one block to the next, int32 [B, H, length].

    Let x = end - 1 - (first token not covered yet), the distance from a row block's last query to that token. The next block
    leaves x' = follow[x] uncovered and starts at end - 65 - x'; x' < 0 means that the row is done, and where no slash is left
    x' is so small that the block would start after the last key. This holds for every row, because blocks depend on distances
    alone.
    """
    kv_len = slash.shape[-1]
    x = torch.arange(length, dtype=torch.int32, device=slash.device)
    chosen = x[:kv_len].where(slash, -1).cummax(-1).values  # the farthest slash at most as far as x
    chosen = torch.cat([chosen, chosen[..., -1:].expand(*slash.shape[:2], length - kv_len)], dim=-1)
    return torch.where(chosen < x - (BLOCK - 1), chosen - 1, x - BLOCK).masked_fill_(chosen < 0, -kv_len - 1)


def vertical_slash_reference(
    follow: Tensor, columns: Tensor, q_len: int, kv_len: int, rows: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition in torch: all rows of all heads step from block to block together.

    follow int32 [B, H, kv_len + 64], columns int32 [B, H, V] ascending, kv_len where there is none -> BlockMask's
    kv_num_blocks, kv_indices, column_num, column_indices; entries that do not count hold kv_len.
    """
    batch, heads, _ = follow.shape
    end = kv_len - q_len + BLOCK * torch.arange(1, rows + 1, device=follow.device)
    x = (end - 1).expand(batch, heads, rows)
    starts = []
    for _ in range(width):
        running = x >= 0
        x = torch.where(running, follow.gather(-1, x.clamp(min=0)).long(), x)
        starts.append(torch.where(running, end - BLOCK - 1 - x, kv_len))
    index = torch.stack(starts, dim=-1).clamp(max=kv_len)  # a ragged last row may step past the last key
    candidates = columns.long()[:, :, None].expand(batch, heads, rows, columns.shape[-1]).contiguous()
    before = torch.searchsorted(index, candidates, right=True) - 1  # the last block that starts at or before the column
    covered = (before >= 0) & (candidates < index.gather(-1, before.clamp(min=0)) + BLOCK)
    num = (index < kv_len).sum(-1, dtype=torch.int32)
    last = index.gather(-1, (num[..., None] - 1).clamp(min=0).long())  # kv_len in a row without blocks
    kept = ~covered & (candidates < (last + BLOCK).minimum(end.clamp(max=kv_len)[:, None]))
    column_index = candidates.where(kept, kv_len).sort(dim=-1).values
    column_num = kept.sum(-1, dtype=torch.int32)
    return num, index.to(torch.int32), column_num, column_index.to(torch.int32)


@triton.jit
def vertical_slash_blocks_kernel(
    follow, num, index, length, offset, kv_len, rows, width, BLOCK: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One program: LANES row blocks of one head, each lane walking its own chain until all are done."""
    i_head = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    follow += i_head * length
    index += (i_head * rows + o_row) * width
    end = offset + (o_row + 1) * BLOCK
    # [LANES]
    b_x = tl.where(o_row < rows, end - 1, -1)
    b_num = tl.zeros([LANES], tl.int32)
    while tl.max(b_x, 0) >= 0:
        m_run = b_x >= 0
        b_x = tl.load(follow + b_x, mask=m_run, other=-1)
        b_start = end - BLOCK - 1 - b_x
        m_store = m_run & (b_start < kv_len)
        tl.store(index + b_num, b_start, mask=m_store)
        b_num += m_store.to(tl.int32)
    tl.store(num + i_head * rows + o_row, b_num, mask=o_row < rows)


@triton.jit
def vertical_slash_columns_kernel(
    columns, num, index, column_num, column_index, listed, offset, kv_len, rows, width, steps,
    BLOCK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: one row block of one head. Columns outside its blocks, found by bisection, are written compactly."""
    i_row = tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    i_mask = i_head * rows + i_row
    columns += i_head * listed
    index += i_mask * width
    column_index += i_mask * listed
    blocks = tl.load(num + i_mask)
    last = tl.load(index + blocks - 1, mask=blocks > 0, other=kv_len)
    end = tl.minimum(tl.minimum(offset + (i_row + 1) * BLOCK, kv_len), last + BLOCK)
    written = 0
    for c in range(0, listed, BC):
        o_c = c + tl.arange(0, BC)
        # [BC]
        b_column = tl.load(columns + o_c, mask=o_c < listed, other=kv_len)
        b_low = tl.zeros(
            [BC], tl.int32
        )  # index[b_low] is the last start at or before the column: the first one is 0 or none is
        b_high = b_low + blocks
        for _ in range(steps):
            b_middle = (b_low + b_high) // 2
            b_start = tl.load(index + b_middle)
            b_low = tl.where(b_start <= b_column, b_middle, b_low)
            b_high = tl.where(b_start <= b_column, b_high, b_middle)
        b_start = tl.load(index + b_low, mask=b_low < blocks, other=kv_len)
        m_keep = (b_column < end) & ((b_column < b_start) | (b_column >= b_start + BLOCK))
        b_slot = written + tl.cumsum(m_keep.to(tl.int32), 0) - 1
        tl.store(column_index + b_slot, b_column, mask=m_keep)
        written += tl.sum(m_keep.to(tl.int32), 0)
    tl.store(column_num + i_mask, written)


def _convert_triton(
    follow: Tensor, columns: Tensor, q_len: int, kv_len: int, rows: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """vertical_slash_reference on the GPU; entries that do not count are left unwritten."""
    batch, heads, length = follow.shape
    listed = columns.shape[-1]
    shape, options = (batch, heads, rows), dict(dtype=torch.int32, device=follow.device)
    num, column_num = torch.empty(shape, **options), torch.empty(shape, **options)
    index, column_index = torch.empty(*shape, width, **options), torch.empty(*shape, listed, **options)
    lanes = 32
    vertical_slash_blocks_kernel[(triton.cdiv(rows, lanes), batch * heads)](
        follow, num, index, length, kv_len - q_len, kv_len, rows, width, BLOCK=BLOCK, LANES=lanes, num_warps=1
    )
    vertical_slash_columns_kernel[(rows, batch * heads)](
        columns, num, index, column_num, column_index, listed, kv_len - q_len, kv_len, rows, width, width.bit_length(),
        BLOCK=BLOCK, BC=128, num_warps=4,
    )  # fmt: skip
    return num, index, column_num, column_index
