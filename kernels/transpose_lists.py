"""The lists of key blocks by query block -> the lists of query blocks by key block: op, reference, Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import power_of_2, runs_triton

ROWS_PER_WORD = 32
TILE_ENTRIES = 2048  # bits that a program of the second kernel looks at


def transpose_lists(
    num: Tensor, index: Tensor, blocks: int, group: int = 1, capacity: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """For every key block, the query blocks that list it. Nothing syncs with the GPU.

    A list of `group` neighbouring heads is common to them, and is compact: list (b, h, j), the heads h * group to (h + 1) *
    group - 1 of batch b and key block j, is entries[start[n] : start[n + 1]] with n = (b * H / group + h) * blocks + j. An
    entry is query block * group + head in its group; they ascend.

    Args:
        num, index: kv_num_blocks [B, H, NQ] and kv_indices [B, H, NQ, K] of a BlockMask whose blocks tile the keys, int32.
        blocks: key blocks NK.
        capacity: length of `entries`, at least the sum of num; B * H * NQ * K by default.
        impl: "auto" (Triton on CUDA) | "triton" | "reference".

    Returns: start int64 [B * H / group * NK + 1], entries int32 [capacity], undefined from start[-1] on.
    Scratch: a bit per block of the map, and 12 bytes per list and 32 query blocks.
    Raises: ValueError when heads are no multiple of group, or for an unknown impl.
    """
    if num.shape[1] % group:
        raise ValueError(f"{num.shape[1]} heads do not make up groups of {group}")
    capacity = index.numel() if capacity is None else capacity
    make = _transpose_lists_triton if runs_triton(impl, num.is_cuda) else transpose_lists_reference
    return make(num, index, blocks, group, capacity)


def transpose_lists_reference(num: Tensor, index: Tensor, blocks: int, group: int, capacity: int) -> tuple[Tensor, Tensor]:
    """The definition in torch, over the map of all blocks."""
    listed = torch.arange(index.shape[-1], device=index.device) < num[..., None]
    chosen = torch.zeros(*num.shape, blocks + 1, dtype=torch.bool, device=index.device)
    chosen.scatter_(-1, index.long().where(listed, blocks), True)
    # [B, H / group, NK, NQ, group]
    chosen = chosen[..., :blocks].unflatten(1, (-1, group)).permute(0, 1, 4, 3, 2)
    start = torch.nn.functional.pad(chosen.flatten(3).sum(-1).flatten().cumsum(0), (1, 0))
    found = chosen.flatten(3).nonzero()[:, -1]
    entries = found.new_zeros(capacity, dtype=torch.int32)
    entries[: len(found)] = found
    return start, entries


@triton.jit
def transpose_lists_mark_kernel(num, index, words, rows, width, blocks, words_per_block, BC: tl.constexpr):
    """One program: one query block of one head sets its bit in the words of the key blocks that it lists."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head = i_row // rows
    i_query = (i_row % rows).to(tl.int32)
    words += (i_head * words_per_block + i_query // 32) * blocks
    listed = tl.load(num + i_row)
    for c in range(0, listed, BC):
        o_entry = c + tl.arange(0, BC)
        # [BC]
        b_block = tl.load(index + i_row * width + o_entry, mask=o_entry < listed, other=0)
        b_bit = tl.full([BC], 1, tl.int32) << (i_query % 32)
        tl.atomic_or(words + b_block, b_bit, mask=o_entry < listed, sem="relaxed")


@triton.jit
def transpose_lists_kernel(
    words, counts, before, entries, blocks, words_per_block, GROUP: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr,
    FILL: tl.constexpr,
):  # fmt: skip
    """One program: BJ key blocks and the 32 query blocks of a word, of a group of heads; counts them, or writes the entries
    after the `before` [lists * words] that come before."""
    i_word = tl.program_id(1)
    i_group = tl.program_id(2).to(tl.int64)
    o_block = tl.program_id(0) * BJ + tl.arange(0, BJ)
    o_entry = tl.arange(0, BR)
    m_block = o_block < blocks
    p_word = words + ((i_group * GROUP + o_entry % GROUP) * words_per_block + i_word)[None, :] * blocks + o_block[:, None]
    # [BJ, BR]
    m_word = m_block[:, None] & (o_entry < 32 * GROUP)[None, :]
    b_bit = (tl.load(p_word, mask=m_word, other=0) >> (o_entry // GROUP % 32)[None, :]) & 1
    o_count = (i_group * blocks + o_block) * words_per_block + i_word
    if FILL:
        b_slot = tl.load(before + o_count, mask=m_block, other=0)[:, None] + tl.cumsum(b_bit, 1) - 1
        b_entry = i_word * 32 * GROUP + o_entry[None, :] + tl.zeros([BJ, BR], tl.int32)
        tl.store(entries + b_slot, b_entry, mask=b_bit > 0)
    else:
        tl.store(counts + o_count, tl.sum(b_bit, 1), mask=m_block)


def _transpose_lists_triton(num: Tensor, index: Tensor, blocks: int, group: int, capacity: int) -> tuple[Tensor, Tensor]:
    num, index = num.contiguous(), index.contiguous()
    batch, heads, rows, width = index.shape
    per_block, groups = triton.cdiv(rows, ROWS_PER_WORD), batch * heads // group
    words = torch.zeros(batch * heads, per_block, blocks, dtype=torch.int32, device=index.device)
    transpose_lists_mark_kernel[(num.numel(),)](
        num, index, words, rows, width, blocks, per_block, BC=min(power_of_2(width), 128), num_warps=1
    )
    counts = torch.empty(groups * blocks * per_block, dtype=torch.int32, device=index.device)
    entries = torch.empty(capacity, dtype=torch.int32, device=index.device)
    BR = power_of_2(ROWS_PER_WORD * group)
    BJ = max(TILE_ENTRIES // BR, 1)
    grid = (triton.cdiv(blocks, BJ), per_block, groups)
    options = dict(GROUP=group, BJ=BJ, BR=BR, num_warps=4)
    transpose_lists_kernel[grid](words, counts, counts, entries, blocks, per_block, FILL=False, **options)
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    transpose_lists_kernel[grid](words, counts, before, entries, blocks, per_block, FILL=True, **options)
    return before[::per_block].contiguous(), entries
