"""SpargeAttn (Zhang et al. 2025, arXiv 2502.18137; thu-ml/SpargeAttn bfd980b), without its quantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import BlockMask, causal_blocks
from ..kernels.block_similarity import block_similarity
from .base import LayerContext, Method, ModelSpec, check_fields, register

SCRATCH_ELEMENTS = 1 << 23  # pooled scores alive at a time, sorted with int64 indices: about 50 bytes each


@register
@dataclass(frozen=True)
class SpargeAttn(Method):
    """Softmax of block means says which blocks a row keeps, where blocks are alike enough for a mean to speak for them.

    Source: section 3.2 of the paper, as get_block_map_meansim runs it. A block is similar when the mean cosine between its
    tokens exceeds simthreshd1. P = causal softmax(scale * mean q . mean k) over the similar key blocks, the others at -inf.
    A row keeps its blocks in descending order of P (ties: the earlier), at least one. A key block that is not similar is kept
    by every row that sees it, and a query block that is not similar keeps all that it sees.

        cdfthreshd  keeps while the cumulative sum of P is <= cdfthreshd: the block that crosses it is dropped. 1 keeps all
                    (rounding decides in the authors' code).
        topk        instead: the best int(topk * NK) blocks, of NK in all, those in the row's future too
        smooth_k    subtracts the mean of all keys (per KV head) from k before similarity and means
        pvthreshd   leaves out P V where all rows of a tile lie this many powers of 2 below their maximum (section 3.4; the
                    authors' kernels work with exponents of 2, default 50). Density stays, it counts the Q K that ran.

    The paper tunes the thresholds of every head on a few inputs until the output's L1 error is small enough, and the code takes
    one value a head; here every head has the same. The authors' defaults with topk are simthreshd1=-0.1, topk=0.35; similarity
    is never negative, so that every whole block is similar. With smooth_k a real model's key blocks may all fall below 0.6
    (SmolLM2's do): then everything is kept whatever the knob, and no density below 1 can be reached; lower simthreshd1 or turn
    smooth_k off.

    As in the authors' kernels a ragged last block is never similar (0 / 0 on its padding), nor is a block with a token of
    length 0, and no diagonal is forced. Left out: INT8 and FP8, which would be confounded with sparsity, and the rounding of
    k - mean, of the means and of their products to the 16 bits of q and k; ours keeps fp32.

    Ours: when a row keeps no block that its first query sees (only the second one at the diagonal, say), the best of those by
    P is read too; the authors' kernels give such queries the plain mean of the future values in the last block. It is
    listed as single key columns, so that the mask's blocks are the authors', and counts for density.

    Chunked prefill (theirs puts the first query at the first key): query blocks start at the chunk's first row, and "all keys"
    and NK mean those so far. With cdfthreshd, smooth_k off and chunks cut at multiples of 128 the selection is that of the
    whole prompt.
    """

    name = "spargeattn"
    paper = "Zhang et al. 2025, arXiv 2502.18137"
    cost = "L D + N_q N_k (D + log N_k)"
    knob = "cdfthreshd"  # an instance with topk carries that one
    knob_range = (0.0, 1.0)

    simthreshd1: float = 0.6  # mean cosine in a similar block, more than this
    cdfthreshd: float = 0.98  # share of P kept
    topk: float | None = None  # share of all key blocks
    smooth_k: bool = True
    pvthreshd: float | None = None  # powers of 2
    q_block: int = 128  # tokens
    kv_block: int = 64  # tokens

    def __post_init__(self):
        check_fields(self, simthreshd1=(-1, 1), cdfthreshd=(0, 1), topk=(0, 1), pvthreshd=(0, math.inf))
        for name in ("topk", "pvthreshd"):
            if getattr(self, name) == 0:
                raise ValueError(f"spargeattn:{name}=0 is out of range, it must be positive")
        for name in ("q_block", "kv_block"):
            if getattr(self, name) not in (64, 128):
                raise ValueError(f"spargeattn:{name}={getattr(self, name)} is neither 64 nor 128")
        if self.topk is not None:
            object.__setattr__(self, "knob", "topk")
            object.__setattr__(self, "knob_range", (1e-4, 1.0))

    def synthetic(self, model: ModelSpec, seed: int) -> SpargeAttn:
        """Without the similarity test: independent random tokens are never alike, so that every block would be kept."""
        return replace(self, simthreshd1=-1.0)

    @property
    def note(self) -> str:
        if self.simthreshd1 < 0:
            return "no similarity test: every whole block counts as similar"
        return "one set of thresholds for every head, tuned on no model here"

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        q_len, kv_len = q.shape[2], k.shape[2]
        group = q.shape[1] // k.shape[1]
        mean = k.mean(2, keepdim=True, dtype=torch.float32) if self.smooth_k else None
        q_mean, q_similar = self._pool(q, self.q_block)
        k_mean, k_similar = (x.repeat_interleave(group, dim=1) for x in self._pool(k, self.kv_block, mean))
        visible = causal_blocks(q_len, kv_len, self.q_block, self.kv_block, q.device)
        # Blocks that a row's first query sees, and so all its queries.
        starts = torch.arange(kv_len - q_len, kv_len, self.q_block, device=q.device)
        seen = torch.arange(0, kv_len, self.kv_block, device=q.device) <= starts[:, None]
        # A few heads at a time; batch rows and heads are alike.
        heads = max(SCRATCH_ELEMENTS // visible.numel(), 1)
        pieces = zip(*(x.flatten(0, 1).split(heads) for x in (q_mean, k_mean, q_similar, k_similar)))
        parts = [
            self._keep(q_part @ k_part.transpose(-1, -2) * ctx.scale, q_alike, k_alike, visible, seen)
            for q_part, k_part, q_alike, k_alike in pieces
        ]
        kept, best = (torch.cat(part).unflatten(0, q.shape[:2]) for part in zip(*parts))
        mask = BlockMask.from_dense(kept, q_len, kv_len, self.q_block, self.kv_block, trusted=True)
        if self.pvthreshd is not None:
            mask = replace(mask, pv_threshold=self.pvthreshd * math.log(2))
        if self.kv_block % self.q_block == 0 and (kv_len - q_len) % self.q_block == 0:
            return mask  # a row's queries see the same blocks
        columns = best[..., None] * self.kv_block + torch.arange(self.kv_block, device=q.device)
        return replace(
            mask, column_indices=columns.clamp(min=0).to(torch.int32), column_num=(best >= 0).to(torch.int32) * self.kv_block
        )

    def _pool(self, x: Tensor, block: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Block means fp32 [B, H, N, D] and which blocks are similar, bool [B, H, N]."""
        pooled, similarity = block_similarity(x, block, mean)
        similar = similarity > self.simthreshd1
        if x.shape[2] % block:
            similar[..., -1] = False
        return pooled, similar

    def _keep(
        self, scores: Tensor, q_similar: Tensor, k_similar: Tensor, visible: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Kept blocks, bool [heads, NQ, NK], and the number of the block that a row with blind queries needs, else -1."""
        scores.masked_fill_(~(visible & k_similar[:, None, :]), float("-inf"))
        p = scores.softmax(-1)  # NaN where no visible block is similar: all of those are kept below
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        if self.topk is not None:
            # In fp32, as the authors compute it: 0.29 of 100 is 29.
            count = int(torch.tensor(self.topk, dtype=torch.float32) * p.shape[-1])
            taken = (torch.arange(p.shape[-1], device=p.device) < count).expand(p.shape).clone()
        else:
            taken = ranked.cumsum(-1) <= (math.inf if self.cdfthreshd == 1 else self.cdfthreshd)
        taken[..., 0] = True
        kept = torch.zeros_like(taken).scatter_(-1, order, taken)
        kept |= ~k_similar[:, None, :] | ~q_similar[:, :, None]
        kept &= visible
        blind = ~(kept & seen).any(-1)
        return kept, p.masked_fill(~seen, -1).argmax(-1).where(blind, -1)
