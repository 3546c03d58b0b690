"""Dilated: first keys and every second diagonal, as MInference's baseline runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask
from ..kernels.vertical_slash import vertical_slash_mask
from .base import LayerContext, Method, register

FIRST_KEYS = 1024
REACH = {1: (0, 8192), 2: (2048, 6144)}  # variant: (distances below this are all chosen, below this every second)


@register
@dataclass(frozen=True)
class Dilated(Method):
    """The first 1024 keys and a dilated window, the same in every head.

    variant 1: every second of the nearest 8192 diagonals; 2: the nearest 2048 diagonals and every second of the next 4096.

    Source: Longformer's dilated window (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), as `dilated1` and `dilated2` of
    microsoft/MInference fb56c91 run it. Their second diagonals are counted from the far end: distances 1, 3, 5, ... (variant 2:
    2049, 2051, ...) when the window is full, L - 1, L - 3, ... in a prompt shorter than it. The lines then go through
    MInference's conversion to 64-token blocks (kernels/vertical_slash.py), whose blocks cover every diagonal between two
    chosen ones: what runs is the first keys and a dense window of 8192 to 8255 (variant 2: 6144 to 6207) tokens, and
    everything in a prompt no longer than the window. Density is what ran.

    Chunks that start at a multiple of 64 select as the whole prompt does; in others the rows of 64 queries are counted from the
    chunk's start, which moves the window's ends by up to 63 tokens.
    """

    name = "dilated"
    paper = "Beltagy et al. 2020, arXiv 2004.05150"
    cost = "none: positions alone"

    variant: int = 1  # 1 or 2, see above

    def __post_init__(self):
        if self.variant not in REACH:
            raise ValueError(f"dilated:variant={self.variant} is out of range: it is 1 or 2")

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        near, reach = REACH[self.variant]
        kv_len = k.shape[2]
        reach = min(reach, kv_len)
        position = torch.arange(kv_len, device=q.device)
        slash = (position < near) | (position < reach) & ((reach - 1 - position) % 2 == 0)
        first = min(FIRST_KEYS, kv_len)
        return vertical_slash_mask((position < first)[None, None], slash[None, None], first, reach, q.shape[2])
