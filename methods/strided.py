"""Strided: the Sparse Transformer's pattern, exact in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.patterns import sink_and_window
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class Strided(Method):
    """Sliding window and every stride-th diagonal: query i sees key j when i - j < window or (i - j) % stride == 0.

    Source: the strided pattern of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509, section 4.3), both of its parts
    in every head (the paper's merged head) and its one length l as two fields. Dense when window >= L or stride = 1; exact in
    chunks.

    It computes much more than it keeps: a diagonal every 128 tokens keeps 1 pair in 128 and touches half of the 64-token
    blocks (all of them from stride 64 down). Density counts the pairs kept; the time is that of the blocks touched.
    """

    name = "strided"
    paper = "Child et al. 2019, arXiv 1904.10509"
    cost = "none: positions alone"
    knob = "window"
    knob_range = (1, 1 << 20)
    knob_log = True

    stride: int = 128  # tokens between two diagonals
    window: int = 128  # tokens, the query's own included

    def __post_init__(self):
        check_fields(self, stride=(1, math.inf), window=(1, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        return sink_and_window(q.shape[2], k.shape[2], 0, self.window, stride=self.stride, device=q.device)
