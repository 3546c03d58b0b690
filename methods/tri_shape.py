"""Tri-shape: A-shape with dense last rows, exact in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.patterns import sink_and_window
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class TriShape(Method):
    """Sink, sliding window and dense last rows: query i sees key j when i - j < local, j < init, or i >= L - last.

    Source: SCBench (Li et al. 2024, arXiv 2412.10319); tri_shape_kernel of microsoft/MInference fb56c91 with its defaults.
    Their code takes at most L - 1 last rows, which changes nothing: the first row sees one key either way. Dense when
    init + local >= L or last >= L.

    A chunk of a chunked prefill does not know whether the prompt goes on: the last rows of every chunk are dense, so its
    masks keep more than those of the whole prompt.
    """

    name = "tri_shape"
    paper = "Li et al. 2024, arXiv 2412.10319"
    cost = "none: positions alone"
    knob = "local"
    knob_range = (1, 1 << 20)
    knob_log = True

    init: int = 128  # tokens
    local: int = 3968  # tokens, the query's own included
    last: int = 100  # rows at the end that see everything

    def __post_init__(self):
        check_fields(self, init=(0, math.inf), local=(1, math.inf), last=(0, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        return sink_and_window(q.shape[2], k.shape[2], self.init, self.local, last=self.last, device=q.device)
