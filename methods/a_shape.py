"""A-shape: the first keys and a local window, exact in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.patterns import sink_and_window
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class AShape(Method):
    """Sink and sliding window: query i sees key j when i - j < local or j < init.

    Source: StreamingLLM's mask (Xiao et al. 2023, arXiv 2309.17453) applied to prefill, the "A-shape" of MInference (arXiv
    2407.02490, section 3.2) with the defaults of its code (microsoft/MInference fb56c91). The same for every head and every
    input. Dense when init + local >= L; exact in chunks.
    """

    name = "a_shape"
    paper = "Xiao et al. 2023, arXiv 2309.17453"
    cost = "none: positions alone"
    knob = "local"
    knob_range = (1, 1 << 20)
    knob_log = True

    init: int = 128  # tokens
    local: int = 3968  # tokens, the query's own included

    def __post_init__(self):
        check_fields(self, init=(0, math.inf), local=(1, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        return sink_and_window(q.shape[2], k.shape[2], self.init, self.local, device=q.device)
