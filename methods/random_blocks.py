"""Random: blocks drawn uniformly, the floor of every block selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import LayerContext, Method, check_fields, register

MASK_32 = 0xFFFFFFFF


@register
@dataclass(frozen=True)
class RandomBlocks(Method):
    """The diagonal block and uniformly drawn causal blocks, up to `density` with the diagonal counted.

    The draw is a hash of (seed, layer, head, absolute row, block): the same on every device and for every batch size.
    """

    name = "random"
    knob = "density"
    knob_range = (0.0, 1.0)

    density: float = 0.1  # share of the causally visible pairs, per head
    block: int = 64  # tokens
    seed: int = 0

    def __post_init__(self):
        check_fields(self, density=(0.0, 1.0), block=(1, 1 << 20), seed=(0, MASK_32))

    def score(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        q_len, kv_len, device = q.shape[2], k.shape[2], q.device
        last_query = (torch.arange(kv_len - q_len, kv_len, self.block, device=device) + self.block).clamp(max=kv_len) - 1
        diagonal = last_query // self.block
        column = torch.arange(-(-kv_len // self.block), device=device)
        head = torch.arange(q.shape[1], device=device)[:, None, None]
        hashed = _mix(head ^ _mix(ctx.layer ^ _mix(self.seed)))
        hashed = _mix(column ^ _mix(diagonal[:, None] ^ hashed))
        uniform = (hashed >> 8).float()  # 24 bits, exact in fp32
        return uniform.masked_fill(column == diagonal[:, None], float("inf"))[None]


def _mix(x: Any) -> Any:
    """A bijection of 32-bit integers (an int, or int64 tensor) that flips about half of the bits for every input bit changed.

    Source: the finaliser of MurmurHash3 (Appleby, public domain), after a step of the golden ratio so that 0 moves.
    """
    x = (x + 0x9E3779B9) & MASK_32
    # A product may overflow int64; its low 32 bits are right all the same.
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)
