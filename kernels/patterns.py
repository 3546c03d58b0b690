"""Masks that depend on positions alone, exact in tokens."""

from __future__ import annotations

import torch

from .block_mask import BlockMask

BLOCK = 64


def sink_and_window(q_len: int, kv_len: int, sink: int, window: int, device=None) -> BlockMask:
    """BlockMask [1, 1, NQ, K] of the 64-token blocks that hold a key j < sink or a key i - j < window of one of their rows,
    with the cut inside the blocks exact in tokens. All sizes in tokens; no sync."""
    q0 = torch.arange(kv_len - q_len, kv_len, BLOCK, device=device)
    q1 = (q0 + BLOCK).clamp(max=kv_len)
    blocks = (q1 + BLOCK - 1) // BLOCK  # causally visible ones
    first_near = (q0 - window + 1).clamp(min=0) // BLOCK
    sinks = first_near.clamp(max=-(-sink // BLOCK))
    num = sinks + blocks - first_near
    # A window reaches over window + BLOCK - 1 tokens of a row, which start anywhere in their first block.
    width = min(-(-kv_len // BLOCK), -(-sink // BLOCK) + (window + 2 * BLOCK - 3) // BLOCK + 1)
    slot = torch.arange(width, device=device)
    index = torch.where(slot < sinks[:, None], slot, slot + (first_near - sinks)[:, None])
    return BlockMask(
        num.to(torch.int32)[None, None], index.to(torch.int32)[None, None], q_len, kv_len, BLOCK, BLOCK,
        window=window, sink=sink, trusted=True,
    )  # fmt: skip
