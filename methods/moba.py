"""MoBA: every query picks whole chunks of keys by the mean key of the chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask
from ..kernels.selection import block_mean, top_blocks
from .base import LayerContext, Method, check_fields, register

SCRATCH_ELEMENTS = 1 << 25  # gate scores at a time: 128k queries of 32 heads over 32 chunks are 2^27


@register
@dataclass(frozen=True)
class MoBA(Method):
    """Every query keeps its own chunk of keys and those whose mean key fits it best, `topk` chunks in all, causal inside them.

    Source: Lu et al. 2025 (arXiv 2502.13189), section 2.2, equations 5 to 8; code at MoonshotAI/MoBA 61e456b
    (moba_attn_varlen_naive). The gate is the dot product with the mean key, unscaled and in fp32, after RoPE; the own chunk
    counts in `topk`, later chunks never do. The defaults are the code's for 128k tokens.

    The paper trains the model with this attention. Here it is put into models that never saw it, so it is no drop-in, and its
    figures are not the paper's. The selection is per query: BlockMask.q_block is 1, and the GPU computes the union of 64
    neighbouring queries. Equal gates are torch.topk's to order, as in the authors' code. Chunks are counted from the first key,
    so a chunked prefill selects what the whole one does. Dense when chunk * topk >= L.
    """

    name = "moba"
    paper = "Lu et al. 2025, arXiv 2502.13189"
    cost = "L D for the means, L (L / chunk) D for the gate"
    knob = "topk"
    knob_range = (1, 1 << 14)
    knob_log = True

    chunk: int = 4096  # tokens
    topk: int = 12  # chunks, the query's own included

    def __post_init__(self):
        check_fields(self, chunk=(1, 1 << 20), topk=(1, 1 << 20))

    @property
    def note(self) -> str:
        return "training-free: the model was not trained with MoBA"

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        batch, heads, q_len, _ = q.shape
        kv_heads, kv_len = k.shape[1:3]
        means = block_mean(k, self.chunk)
        chunks = means.shape[2]
        width = min(self.topk, chunks)
        query = torch.arange(kv_len - q_len, kv_len, device=q.device)
        own = query // self.chunk
        chunk = torch.arange(chunks, device=q.device)
        if width == chunks:  # every visible chunk is chosen
            num, index = (own + 1).to(torch.int32)[None, None], chunk.to(torch.int32).expand(1, 1, q_len, -1).contiguous()
            return BlockMask(num, index, q_len, kv_len, 1, self.chunk, trusted=True)
        index = torch.empty(batch, heads, q_len, width, dtype=torch.int32, device=q.device)
        grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
        step = max(SCRATCH_ELEMENTS // (batch * heads * max(chunks, q.shape[3])), 1)
        for start in range(0, q_len, step):
            part = slice(start, start + step)
            gate = grouped[:, :, :, part].float() @ means[:, :, None].transpose(-1, -2)
            gate = gate.flatten(1, 2).masked_fill_(chunk > own[part, None], float("-inf"))
            index[:, :, part] = top_blocks(gate.masked_fill_(chunk == own[part, None], float("inf")), width)
        num = (own + 1).clamp(max=width).to(torch.int32).expand(batch, heads, q_len).contiguous()
        return BlockMask(num, index, q_len, kv_len, 1, self.chunk, trusted=True)
