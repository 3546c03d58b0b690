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
        (_, heads, q_len, _), kv_len, device = q.shape, k.shape[2], q.device
        last_query = row_bounds(q_len, kv_len, self.block, device)[1] - 1
        diagonal = last_query // self.block
        blocks = -(-kv_len // self.block)
        step = max(SCRATCH_ELEMENTS // (len(diagonal) * blocks), 1)
        parts = []
        for head in torch.arange(heads, device=device).split(step):
            scores = random_scores(self.seed, ctx.layer, head, diagonal, blocks)
            scores.scatter_(-1, diagonal[:, None].expand(len(head), -1, 1), float("inf"))
            parts.append(keep_top(scores[None], q_len, kv_len, self.block, self.block, self.density))
        num, index = (torch.cat(lists, dim=1) for lists in zip(*((part.kv_num_blocks, part.kv_indices) for part in parts)))
        return BlockMask(num, index, q_len, kv_len, self.block, self.block, trusted=True)
