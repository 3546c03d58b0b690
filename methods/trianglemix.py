"""TriangleMix: dense early layers, tri-shape in the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.patterns import sink_and_window
from .base import LayerContext, Method, check_fields, dense_mask, register


@register
@dataclass(frozen=True)
class TriangleMix(Method):
    """Dense layers before `starting_layer`, tri-shape from there on: i - j < local, j < init, or i >= L - last.

    Source: TriangleMix (He et al. 2025, arXiv 2507.21526); tri_mix_forward of microsoft/MInference fb56c91. The authors choose
    the layer for every model and pass 16 for Llama-3.1-8B, half of its 32 layers, so None means half of the model's layers,
    rounded down; their code without a value starts at layer 0. They also pass 128 last rows, under a name that their kernel
    does not read: 100 rows ran, our default. A starting_layer of the model's depth or more is dense.

    Outside a model the depth is unknown and None means layer 0. The last rows of every chunk of a chunked prefill are dense,
    because a chunk does not know whether the prompt goes on.
    """

    name = "trianglemix"
    paper = "He et al. 2025, arXiv 2507.21526"
    cost = "none: positions and the layer's number alone"
    knob = "starting_layer"
    knob_range = (0, 128)

    starting_layer: int | None = None  # the first sparse layer, counted from 0; None: half the depth
    init: int = 8  # tokens
    local: int = 512  # tokens, the query's own included
    last: int = 100  # rows at the end that see everything

    def __post_init__(self):
        check_fields(self, starting_layer=(0, math.inf), init=(0, math.inf), local=(1, math.inf), last=(0, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        start = ctx.num_layers // 2 if self.starting_layer is None else self.starting_layer
        if ctx.layer < start:
            return dense_mask(q.shape[2], k.shape[2], q.device)
        return sink_and_window(q.shape[2], k.shape[2], self.init, self.local, last=self.last, device=q.device)
