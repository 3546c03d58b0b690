"""Random: blocks drawn uniformly, the floor of every block selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask
from ..kernels.block_lists import row_bounds
from ..kernels.selection import keep_top, random_scores
from .base import LayerContext, Method, check_fields, register

SCRATCH_ELEMENTS = 1 << 24  # random numbers at a time; a few int64 tensors of them are alive


@register
@dataclass(frozen=True)
class RandomBlocks(Method):
    """The diagonal block and uniformly drawn causal blocks, up to `density` with the diagonal counted.

    The draw is a hash of (seed, layer, head, absolute row, block): the same on every device and for every batch size. A chunk
    of a chunked prefill shares its pairs among its own rows.
    """

    name = "random"
    paper = "none, it is a baseline"
    cost = "O(N^2) random numbers, sorted by row"
    knob = "density"
    knob_range = (0.0, 1.0)

    density: float = 0.1  # share of the causally visible pairs, per head
    block: int = 64  # tokens
    seed: int = 0  # of the draw

    def __post_init__(self):
        check_fields(self, density=(0.0, 1.0), block=(1, 1 << 20), seed=(0, 2**32 - 1))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        heads = torch.arange(q.shape[1], device=q.device)
        blocks = self.block, self.block
        return random_mask(heads, q.shape[2], k.shape[2], *blocks, self.density, self.seed, ctx.layer)


def random_mask(
    heads: Tensor, q_len: int, kv_len: int, q_block: int, kv_block: int, density: float, seed: int, layer: int = 0
) -> BlockMask:
    """Random blocks of q_block x kv_block tokens for int64 `heads`, those at the diagonal first; see RandomBlocks."""
    first, end = row_bounds(q_len, kv_len, q_block, heads.device)
    row, last = (end - 1) // q_block, (end - 1)[:, None] // kv_block
    column = torch.arange(-(-kv_len // kv_block), device=heads.device)
    nearest = (first[:, None] // kv_block).maximum(last + 1 - max(q_block // kv_block, 1))
    diagonal = (nearest <= column) & (column <= last)
    parts = []
    for head in heads.split(max(SCRATCH_ELEMENTS // diagonal.numel(), 1)):
        scores = random_scores(seed, layer, head, row, len(column)).masked_fill_(diagonal, float("inf"))
        parts.append(keep_top(scores[None], q_len, kv_len, q_block, kv_block, density))
    num, index = (torch.cat(lists, dim=1) for lists in zip(*((part.kv_num_blocks, part.kv_indices) for part in parts)))
    return BlockMask(num, index, q_len, kv_len, q_block, kv_block, trusted=True)
