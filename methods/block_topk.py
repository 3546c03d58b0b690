"""Block top-k: the blocks whose mean key fits a row's mean query best, MInference's block-sparse pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BlockMask, causal_blocks
from ..kernels.selection import block_mean, seen_first, top_blocks
from .base import LayerContext, Method, check_fields, register

SCRATCH_BYTES = 1 << 26  # of fp32 scores at a time


@register
@dataclass(frozen=True)
class BlockTopK(Method):
    """Every row of blocks keeps its `topk` best causal blocks by the dot product of mean query and mean key, unscaled.

    Source: the block-sparse pattern of MInference (Jiang et al. 2024, arXiv 2407.02490, Algorithm 3) with topk = 100 as in
    microsoft/MInference fb56c91. Neither the diagonal nor the first block is forced; rows with at most topk causal blocks are
    dense. A last block of n < block tokens is padded with zeros there, so its mean key is the mean of its n keys times
    n / block, which moves its score in the last row (no other sees it) towards 0; padding the queries changes no order. Equal
    scores are told apart as torch.topk does, in their code and here. Ours: bf16 inputs are pooled in fp32, and no q is rounded
    in the attention (their kernel rounds the scaled q to bf16).

    Chunks cut at multiples of `block` select as the whole prompt does. In a chunk that starts inside a block, rows are counted
    from its start, and the best block that the first query of a row sees is kept as one of its topk.
    """

    name = "block_topk"
    paper = "Jiang et al. 2024, arXiv 2407.02490"
    cost = "O(L D + N^2 D)"
    knob = "topk"
    knob_range = (1, 16384)
    knob_log = True

    topk: int = 100  # blocks per row
    block: int = 64  # tokens

    def __post_init__(self):
        check_fields(self, topk=(1, math.inf), block=(1, 1 << 20))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        (batch, heads, q_len, _), (kv_heads, kv_len) = q.shape, k.shape[1:3]
        block, group = self.block, heads // kv_heads
        visible = causal_blocks(q_len, kv_len, block, block, q.device)
        rows, blocks = visible.shape
        queries, keys = block_mean(q, block), block_mean(k, block)
        if kv_len % block:
            keys[:, :, -1] *= kv_len % block / block
        width = min(self.topk, blocks)
        index = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=q.device)
        step = max(SCRATCH_BYTES // (4 * batch * group * rows * blocks), 1)
        for h in range(0, kv_heads, step):
            key = keys[:, h : h + step]
            part = slice(h * group, (h + key.shape[1]) * group)
            query = queries[:, part].reshape(batch, key.shape[1], group * rows, -1)
            scores = (query @ key.transpose(-1, -2)).view(batch, -1, rows, blocks).masked_fill_(~visible, float("-inf"))
            if (kv_len - q_len) % block:
                scores = seen_first(scores, kv_len - q_len, block, block)
            index[:, part] = top_blocks(scores, width)
        num = visible.sum(-1, dtype=torch.int32).clamp(max=width).expand(batch, heads, rows).contiguous()
        return BlockMask(num, index, q_len, kv_len, block, block, trusted=True)
