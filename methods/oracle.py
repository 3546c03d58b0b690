"""Oracle: the blocks that the dense attention itself weighs most, the ceiling of every block selection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.block_mass import block_mass
from .base import LayerContext, Method, check_fields, keep_top, register


@register
@dataclass(frozen=True)
class Oracle(Method):
    """The top blocks of every row by exact softmax mass, or by the largest probability in the block.

    How many a row gets: as many as keep the most mass (or probability) of the whole head for its pairs, so that no other
    selection of whole blocks with as many pairs a head has a higher recall, up to one block. Computes the dense attention
    map to select from it, so it says nothing about speed. by="max" is the teacher that SeerAttention distils
    (arXiv 2410.13276, section 3.2). The diagonal is kept only when it earns its place.
    """

    name = "oracle"
    knob = "density"
    knob_range = (0.0, 1.0)

    density: float = 0.1  # share of the causally visible pairs, per head
    by: str = "mass"  # "mass" or "max"
    block: int = 64  # tokens

    def __post_init__(self):
        check_fields(self, density=(0.0, 1.0), block=(1, 1 << 20))
        if self.by not in ("mass", "max"):
            raise ValueError(f"oracle:by={self.by} is neither mass nor max")

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        scores = block_mass(q, k, ctx.scale, self.block, self.block, self.by)
        return keep_top(scores, q.shape[2], k.shape[2], self.block, self.block, self.density, across_rows=True)
