"""A-shape: the first keys and a local window, exact in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask
from .base import LayerContext, Method, check_fields, register

BLOCK = 64


@register
@dataclass(frozen=True)
class AShape(Method):
    """Sink and sliding window: query i sees key j when i - j < local or j < init.

    Source: StreamingLLM's mask (Xiao et al. 2023, arXiv 2309.17453) applied to prefill, the "A-shape" of MInference (arXiv
    2407.02490, section 3.2) with its code's defaults. The same for every head and every input. Dense when init + local >= L.
    """

    name = "a_shape"
    knob = "local"
    knob_range = (1, 1 << 20)
    knob_log = True

    init: int = 128  # tokens
    local: int = 3968  # tokens, the query's own included

    def __post_init__(self):
        check_fields(self, init=(0, math.inf), local=(1, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        return sink_and_window(q.shape[2], k.shape[2], self.init, self.local, device=q.device)


def sink_and_window(q_len: int, kv_len: int, sink: int, window: int, device=None) -> BlockMask:
    """BlockMask [1, 1, NQ, K] of the 64-token blocks that hold a key j < sink or a key i - j < window of one of their rows,
    with the cut inside the blocks exact in tokens. All sizes in tokens; no sync."""
    q0 = torch.arange(kv_len - q_len, kv_len, BLOCK, device=device)
    q1 = (q0 + BLOCK).clamp(max=kv_len)
    blocks = (q1 + BLOCK - 1) // BLOCK  # causally visible ones
    first_near = (q0 - window + 1).clamp(min=0) // BLOCK
    sinks = first_near.clamp(max=-(-sink // BLOCK))
    num = sinks + blocks - first_near
    # A window reaches over window + BLOCK - 1 tokens of a row, which start anywhere in their first block.
    width = min(-(-kv_len // BLOCK), -(-sink // BLOCK) + (window + 2 * BLOCK - 3) // BLOCK + 1)
    slot = torch.arange(width, device=device)
    index = torch.where(slot < sinks[:, None], slot, slot + (first_near - sinks)[:, None])
    return BlockMask(
        num.to(torch.int32)[None, None], index.to(torch.int32)[None, None], q_len, kv_len, BLOCK, BLOCK,
        window=window, sink=sink, trusted=True,
    )  # fmt: skip
