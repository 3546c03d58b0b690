"""Masks that depend on positions alone, exact in tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_mask import BlockMask

BLOCK = 64


def sink_and_window(
    q_len: int, kv_len: int, sink: int, window: int, *, last: int = 0, stride: int | None = None, device=None
) -> BlockMask:
    """BlockMask [1, 1, NQ, K] of the 64-token blocks that hold a key j < sink, a key i - j < window of one of their rows i, a
    key with i - j a multiple of `stride`, or any key that one of the `last` rows sees; the cut inside the blocks is exact in
    tokens. All sizes in tokens, window >= 1. No sync; K is all key blocks with `last` or `stride`, else what a window needs.
    """
    q0 = torch.arange(kv_len - q_len, kv_len, BLOCK, device=device)
    q1 = (q0 + BLOCK).clamp(max=kv_len)
    first_near = (q0 - window + 1).clamp(min=0) // BLOCK
    first_near = first_near.masked_fill(q1 > kv_len - last, 0)
    sink_blocks = -(-sink // BLOCK)
    if stride is not None:
        num, index = _strided(q0, q1, first_near, sink_blocks, kv_len, stride)
    else:
        width = -(-kv_len // BLOCK)
        if not last:  # a window reaches over window + BLOCK - 1 tokens of a row, which start anywhere in their first block
            width = min(width, sink_blocks + (window + 2 * BLOCK - 3) // BLOCK + 1)
        num, index = _near(q1, first_near, sink_blocks, width)
    return BlockMask(
        num.to(torch.int32)[None, None], index.to(torch.int32)[None, None], q_len, kv_len, BLOCK, BLOCK,
        window=window, sink=sink, last=last, stride=stride, trusted=True,
    )  # fmt: skip


def _near(q1: Tensor, first_near: Tensor, sink_blocks: int, width: int) -> tuple[Tensor, Tensor]:
    """Blocks before `sink_blocks` and from `first_near` to the causal end."""
    sinks = first_near.clamp(max=sink_blocks)
    num = sinks + (q1 + BLOCK - 1) // BLOCK - first_near
    slot = torch.arange(width, device=q1.device)
    return num, torch.where(slot < sinks[:, None], slot, slot + (first_near - sinks)[:, None])


def _strided(q0: Tensor, q1: Tensor, first_near: Tensor, sink_blocks: int, kv_len: int, stride: int) -> tuple[Tensor, Tensor]:
    """Those, and the blocks that a distance divisible by `stride` reaches."""
    block = torch.arange(-(-kv_len // BLOCK), device=q0.device)
    # The queries of a row and the keys of a block lie at all distances between these two.
    farthest = (q1 - 1)[:, None] - block * BLOCK
    nearest = (q0[:, None] - block * BLOCK - (BLOCK - 1)).clamp(min=0)
    chosen = (block < sink_blocks) | (block >= first_near[:, None]) | (farthest // stride * stride >= nearest)
    chosen &= farthest >= 0
    index = block.to(torch.int32).where(chosen, len(block)).sort(dim=-1).values
    return chosen.sum(-1), index
