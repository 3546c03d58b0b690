"""BigBird: neighbouring, first and random blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask
from ..kernels.selection import random_scores, top_blocks
from .base import LayerContext, Method, check_fields, register

SCRATCH_ELEMENTS = 1 << 23  # random numbers at a time; a few int64 tensors of them are alive


@register
@dataclass(frozen=True)
class BigBird(Method):
    """Every row of blocks keeps the nearest `window` blocks, the first `globals` blocks and `random` others.

    Source: BigBird (Zaheer et al. 2020, arXiv 2007.14062, section 2) with the block counts of its ITC models.
    Adapted to causal attention: the window is the row's own block and those before it (the paper's lies around it), the random
    blocks are drawn uniformly, without repetition, from the causal blocks that are neither window nor global, and the global
    rows see everything before them, which window and globals give them already. Dense when window, globals or random reach
    the number of blocks.

    The draw is a hash of (seed, layer, head, absolute row, block): the same on every device and for every batch size, and a
    higher `random` only adds blocks. Chunks that start at a multiple of `block` select as the whole prompt does; in others a
    row's queries lie in two blocks: the window reaches back from the first and the draw is that of the last.
    """

    name = "bigbird"
    paper = "Zaheer et al. 2020, arXiv 2007.14062"
    cost = "O(N^2) random numbers"
    knob = "random"
    knob_range = (0, 4096)

    window: int = 3  # blocks, the row's own included
    globals: int = 2  # blocks at the start
    random: int = 3  # blocks per row
    block: int = 64  # tokens
    seed: int = 0  # of the draw

    def __post_init__(self):
        most = math.inf
        check_fields(self, window=(1, most), globals=(0, most), random=(0, most), block=(1, 1 << 20), seed=(0, 2**32 - 1))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        (_, heads, q_len, _), kv_len = q.shape, k.shape[2]
        blocks, options = -(-kv_len // self.block), dict(dtype=torch.int32, device=q.device)
        first_query = torch.arange(kv_len - q_len, kv_len, self.block, device=q.device)
        own = ((first_query + self.block).clamp(max=kv_len) - 1) // self.block
        near = (first_query // self.block - self.window + 1).clamp(min=0)[:, None]
        number, head = torch.arange(blocks, device=q.device), torch.arange(heads, device=q.device)
        first = number[: self.globals].where(number[: self.globals] < near, blocks)
        nearest = near + number[: self.window + 1]
        fixed = torch.cat((first, nearest.where(nearest <= own[:, None], blocks)), dim=-1).to(torch.int32)
        free = (number >= self.globals) & (number < near)
        draws = min(self.random, blocks)
        index = torch.empty(heads, len(own), min(fixed.shape[-1] + draws, blocks), **options)
        step = max(SCRATCH_ELEMENTS // (heads * blocks), 1)
        for start in range(0, len(own), step):
            part = slice(start, start + step)
            scores = random_scores(self.seed, ctx.layer, head, own[part], blocks)
            # In fp64 the block's number makes equal draws unequal, so that no device breaks a tie in its own way.
            scores = (scores.double() * blocks - number).masked_fill_(~free[part], float("-inf"))
            drawn = top_blocks(scores, draws)
            row = torch.cat((fixed[part].expand(heads, -1, -1), drawn), dim=-1).sort(dim=-1).values
            index[:, part] = row[..., : index.shape[-1]]
        num = (index < blocks).sum(-1, dtype=torch.int32)
        return BlockMask(num[None], index[None], q_len, kv_len, self.block, self.block, trusted=True)
