"""Random: blocks drawn uniformly, the floor of every block selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.selection import random_scores
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class RandomBlocks(Method):
    """The diagonal block and uniformly drawn causal blocks, up to `density` with the diagonal counted.

    The draw is a hash of (seed, layer, head, absolute row, block): the same on every device and for every batch size.
    """

    name = "random"
    paper = "none, it is a baseline"
    cost = "O(N^2) random numbers, sorted by row"
    knob = "density"
    knob_range = (0.0, 1.0)

    density: float = 0.1  # share of the causally visible pairs, per head
    block: int = 64  # tokens
    seed: int = 0

    def __post_init__(self):
        check_fields(self, density=(0.0, 1.0), block=(1, 1 << 20), seed=(0, 2**32 - 1))

    def score(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        q_len, kv_len, device = q.shape[2], k.shape[2], q.device
        last_query = (torch.arange(kv_len - q_len, kv_len, self.block, device=device) + self.block).clamp(max=kv_len) - 1
        diagonal = last_query // self.block
        scores = random_scores(self.seed, ctx.layer, q.shape[1], diagonal, -(-kv_len // self.block))
        return scores.scatter(-1, diagonal[:, None].expand(q.shape[1], -1, 1), float("inf"))[None]
