"""Local: a sliding window, exact in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.patterns import sink_and_window
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class Local(Method):
    """Sliding window: query i sees key j when i - j < window.

    Source: the sliding window of Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), its causal half. Dense when
    window >= L; exact in chunks.
    """

    name = "local"
    paper = "Beltagy et al. 2020, arXiv 2004.05150"
    cost = "none: positions alone"
    knob = "window"
    knob_range = (1, 1 << 20)
    knob_log = True

    window: int = 4096  # tokens, the query's own included

    def __post_init__(self):
        check_fields(self, window=(1, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        return sink_and_window(q.shape[2], k.shape[2], 0, self.window, device=q.device)
