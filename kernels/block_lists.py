"""Block map -> the numbers of every row's blocks: op, reference, Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import runs_triton

SCRATCH_ELEMENTS = 1 << 22  # int64 temporaries alive at a time: 128k tokens in blocks of 64 have 2^27 blocks in 32 heads
FULL_WIDTH_BYTES = 1 << 28  # lists up to this size are as wide as the map on a GPU, because learning the widest row syncs


def visible_pairs(q_len: int, kv_len: int) -> int:
    """(query, key) pairs that causality leaves one head, q's last row at k's last row."""
    return q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2


def row_bounds(q_len: int, kv_len: int, q_block: int, device=None) -> tuple[Tensor, Tensor]:
    """Absolute position of each query block's first row and of the row after its last, int64 [NQ]."""
    offset = kv_len - q_len
    start = torch.arange(offset, kv_len, q_block, device=device)
    return start, (start + q_block).clamp(max=kv_len)


def causal_blocks(q_len: int, kv_len: int, q_block: int, kv_block: int, device=None) -> Tensor:
    """Blocks of which at least one (query, key) pair is causally visible; q's last row sits at k's last row.

    Returns: bool [NQ, NK], NQ = ceil(q_len / q_block), NK = ceil(kv_len / kv_block).
    """
    last_query = row_bounds(q_len, kv_len, q_block, device)[1] - 1
    first_key = torch.arange(0, kv_len, kv_block, device=device)
    return first_key[None, :] <= last_query[:, None]


def edge_blocks(offset: int, q_block: int, kv_block: int) -> int:
    """Whole blocks at the end of a row's list that may hold a key later than the row's first query. offset: kv_len - q_len."""
    if offset % max(q_block, kv_block) == 0:
        return max(q_block // kv_block, 1)
    # Blocks that start less than q_block rows after the first query and end after it.
    return (q_block + kv_block - 3) // kv_block + 1


def numbers(chosen: Tensor, width: int) -> Tensor:
    """int32 [..., width]: where every row of bool [..., N] is True, ascending, then zeros; no row has more than `width`."""
    rows, number = chosen.flatten(0, -2), torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    out = torch.zeros(len(rows), width, dtype=torch.int32, device=chosen.device)
    step = max(SCRATCH_ELEMENTS // chosen.shape[-1], 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        slot = (part.cumsum(-1) - 1).where(part, width)
        found = out.new_zeros(len(part), width + 1).scatter_(-1, slot, number.expand(slot.shape))
        out[start : start + step] = found[:, :width]
    return out.view(*chosen.shape[:-1], width)


def block_lists(
    dense: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, impl: str = "auto"
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """BlockMask's kv_num_blocks [B, H, NQ] and kv_indices [B, H, NQ, K] of a block map; blocks no row can see are dropped.

    Args: dense: bool [B, H, NQ, NK];  lengths and blocks in tokens;  impl: "auto" (Triton on CUDA) | "triton" | "reference".
    Returns: int32; K is the widest row on a CPU, on a GPU at least that, and NK where that spares a sync. Entries after a
    row's last are undefined.
    Raises: ValueError for another dtype or shape, or an unknown impl.
    """
    shape = (-(-q_len // q_block), -(-kv_len // kv_block))
    if dense.dtype != torch.bool or dense.ndim != 4 or dense.shape[2:] != shape:
        raise ValueError(f"from_dense takes bool [B, H, {shape[0]}, {shape[1]}], got {dense.dtype} {tuple(dense.shape)}")
    if runs_triton(impl, dense.is_cuda):
        return _block_lists_triton(dense, q_len, kv_len, q_block, kv_block)
    return block_lists_reference(dense, q_len, kv_len, q_block, kv_block)


def block_lists_reference(dense: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> tuple[Tensor, Tensor]:
    """The definition in torch."""
    dense = dense & causal_blocks(q_len, kv_len, q_block, kv_block, dense.device)
    num = dense.sum(-1, dtype=torch.int32)
    return num, numbers(dense, max(int(num.max()), 1))


@triton.jit
def block_lists_kernel(dense, num, index, rows, blocks, width, offset, kv_len, q_block, kv_block, BC: tl.constexpr):
    """One program: one row of blocks of one head."""
    i_row = tl.program_id(0).to(tl.int64)
    dense += i_row * blocks
    index += i_row * width
    end = tl.minimum(offset + (i_row % rows + 1) * q_block, kv_len)
    visible = (end - 1) // kv_block + 1
    written = 0
    for c in range(0, visible, BC):
        o_block = (c + tl.arange(0, BC)).to(tl.int32)
        # [BC]
        b_chosen = tl.load(dense + o_block, mask=o_block < visible, other=0).to(tl.int32)
        b_slot = written + tl.cumsum(b_chosen, 0) - 1
        tl.store(index + b_slot, o_block, mask=(b_chosen > 0) & (b_slot < width))
        written += tl.sum(b_chosen, 0)
    tl.store(num + i_row, written)


def _block_lists_triton(dense: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int) -> tuple[Tensor, Tensor]:
    dense = dense.contiguous()
    rows, blocks = dense.shape[2:]
    width = blocks
    if 4 * dense.numel() > FULL_WIDTH_BYTES:
        width = max(int(dense.sum(-1, dtype=torch.int32).max()), 1)
    num = torch.empty(dense.shape[:3], dtype=torch.int32, device=dense.device)
    index = torch.empty(*dense.shape[:3], width, dtype=torch.int32, device=dense.device)
    block_lists_kernel[(num.numel(),)](
        dense.view(torch.uint8), num, index, rows, blocks, width, kv_len - q_len, kv_len, q_block, kv_block,
        BC=min(triton.next_power_of_2(blocks), 1024), num_warps=1,
    )  # fmt: skip
    return num, index
