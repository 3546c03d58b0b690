"""Full causal attention: what every sparse method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import LayerContext, Method, dense_attention, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """softmax(scale * q k^T, causal) v through torch's scaled_dot_product_attention (on an H100 it picks cuDNN)."""

    name = "dense"
    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    cost = "none: nothing is selected"
    phases = frozenset({"prefill", "decode"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        return dense_attention(q, k, v, ctx.scale)
