"""Oracle: the blocks that the dense attention itself weighs most, the ceiling of every block selection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels import BlockMask
from ..kernels.block_mass import REDUCTIONS, block_mass
from ..kernels.selection import block_pairs, keep_top, seen_first
from .base import LayerContext, Method, check_fields, register


@register
@dataclass(frozen=True)
class Oracle(Method):
    """The top blocks of every row by exact softmax mass, by the largest probability in the block, or by the largest mass that
    one of its queries has in it (row_mass).

    How many a row gets: one at least, and as many as keep the most mass (or probability) of the whole head for its pairs, so
    that no other selection of whole blocks with as many pairs a head has a higher recall, up to one block, unless one block a
    row is already most of the density. A chunk of a chunked prefill shares its pairs among its own rows. `threshold` instead of
    `density` keeps, in all heads and layers alike, the blocks whose mass per visible pair exceeds it (and of every row the
    best one that all its queries see): the ceiling also of methods that move pairs between heads and layers, as a threshold
    on a gate's scores does.

    Computes the dense attention map to select from it, so it says nothing about speed. by="max" is the teacher that
    SeerAttention distils (arXiv 2410.13276, section 3.2). The diagonal is kept only when it earns its place.
    """

    name = "oracle"
    paper = "none, it is a bound (by=max: Gao et al. 2024, arXiv 2410.13276)"
    cost = "O(L^2 D), the dense attention map"
    knob = "density"
    knob_range = (0.0, 1.0)

    density: float = 0.1  # share of the causally visible pairs, per head
    by: str = "mass"  # or "max", "row_mass"
    block: int = 64  # tokens
    threshold: float | None = None  # mass per visible pair, instead of density

    def __post_init__(self):
        check_fields(self, density=(0.0, 1.0), block=(1, 1 << 20), threshold=(0.0, 1.0))
        if self.threshold is not None:
            if self.by != "mass":
                raise ValueError(f"oracle:threshold is on mass, by={self.by} has none")
            for name, value in (("knob", "threshold"), ("knob_range", (1.0, 1e-9)), ("knob_log", True)):
                object.__setattr__(self, name, value)
        if self.by not in REDUCTIONS:
            raise ValueError(f"oracle:by={self.by} is none of {', '.join(REDUCTIONS)}")

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        scores = block_mass(q, k, ctx.scale, self.block, self.block, self.by)
        if self.threshold is not None:
            pairs = block_pairs(q.shape[2], k.shape[2], self.block, self.block, q.device)
            kept = seen_first(scores, k.shape[2] - q.shape[2], self.block, self.block) > self.threshold * pairs
            return BlockMask.from_dense(kept, q.shape[2], k.shape[2], self.block, self.block, trusted=True)
        return keep_top(scores, q.shape[2], k.shape[2], self.block, self.block, self.density, across_rows=True)
