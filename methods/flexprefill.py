"""FlexPrefill: vertical-slash lines up to a share of the attention, or a query-aware map, chosen per head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import BlockMask, causal_blocks
from ..kernels.line_scores import line_scores
from ..kernels.selection import block_mean
from .base import LayerContext, Method, check_fields, register

LINES_PER_BLOCK = 128  # the authors' code divides a count of lines by this whatever the block
BLOCKS = (32, 64, 128)
SORTED_ENTRIES = 1 << 23  # of pooled maps at a time; sorting takes some 50 bytes for each


@register
@dataclass(frozen=True)
class FlexPrefill(Method):
    """Every head keeps what holds a share `gamma` of attention: vertical and slash blocks, or blocks of the mean-pooled map.

    Source: Lai et al. 2025 (arXiv 2502.20766), Algorithms 1 to 4, as its code runs (bytedance/FlexPrefill a24b27b).

    P = causal softmax of the last `block` queries. A head is query-aware when the Jensen-Shannon distance (the square root of
    the divergence, natural logarithm) between P summed over key blocks and softmax(mean last query . mean-pooled keys) is
    below `tau`. A distance that is no number, as where a block's probability underflows to 0, makes no head query-aware.
        vertical-slash  As many key columns as bring the running sum of P's column means, largest first, past gamma, and as
            many diagonals by P's diagonal means. `count // 128 + 1` blocks of each, within the budgets, are kept by their
            block sums; the first key block and the main diagonal count as the best.
        query-aware     Causal softmax of the mean-pooled map; of all its entries, largest first, those whose running sum
            stays within gamma x rows, and the map's first block. Vertical and slash blocks of the minimum budget are added.

    gamma: in (0, 1]; the paper runs 0.9, and 0.95 for Llama on RULER. 1 without max_budget runs dense.
    tau: 0 makes no head query-aware.
    min_budget, max_budget: tokens of vertical and of slash lines each, rounded up to blocks; min_budget=None is one block.
        The minimum limits how sparse a head can be whatever gamma: with 512 and lines near the start and the diagonal, a
        density of 0.41 at 4k tokens, 0.22 at 8k, 0.06 at 32k and 0.015 at 128k.
    block: 32, 64 or 128 tokens; the Triton kernel of attention needs 64 or 128.

    Prompts of at most max(2 block, min_budget rounded up) tokens, and single queries, run dense.

    Paper and code: the paper has no `// 128 + 1` and counts the entry that crosses gamma of a query-aware head as kept. The
    128 stays 128 for other blocks, so with 64 about half the lines are kept. The code lets a head of no lines (query-aware,
    min_budget 0) still keep the first column and the main diagonal when another head of the layer has lines; where none has,
    rows can stay empty, and running that mask raises an error. Both hold here, per batch row.

    Ours: ties go to the earlier key block and the nearer diagonal. The code needs as many queries as keys, and here a chunk of
    a chunked prefill is refused, because a query-aware head weighs all rows of the prompt against one another. With tau=0 a
    chunk is the end of the prompt so far, its lines ranked by its own last queries; a block of queries across two key blocks
    gets the slashes of both.
    """

    name = "flexprefill"
    paper = "Lai et al. 2025, arXiv 2502.20766"
    cost = "O(block L D + L log L + N^2 (D + log N))"
    knob = "gamma"
    knob_range = (0.01, 1.0)

    gamma: float = 0.9  # share of attention kept
    tau: float = 0.1  # Jensen-Shannon distance of query-aware heads, less than this
    min_budget: int | None = 512  # tokens
    max_budget: int | None = None  # tokens
    block: int = 128  # tokens

    def __post_init__(self):
        check_fields(self, gamma=(0.0, 1.0), tau=(0.0, math.inf), min_budget=(0, math.inf), max_budget=(1, math.inf))
        if self.gamma == 0:
            raise ValueError("flexprefill:gamma=0 is out of range (0, 1]")
        if self.block not in BLOCKS:
            raise ValueError(f"flexprefill:block={self.block} is none of {', '.join(map(str, BLOCKS))}")
        if self.max_budget is not None and self.max_budget < (self.min_budget or 0):
            raise ValueError(f"flexprefill:max_budget={self.max_budget} is below min_budget={self.min_budget}")

    @property
    def min_blocks(self) -> int:
        return 1 if self.min_budget is None else -(-self.min_budget // self.block)

    def runs_dense(self, q_len: int, kv_len: int) -> bool:
        everything = self.gamma == 1 and self.max_budget is None
        return everything or q_len == 1 or kv_len <= self.block * max(2, self.min_blocks)

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        q_len, kv_len = q.shape[2], k.shape[2]
        visible = causal_blocks(q_len, kv_len, self.block, self.block, q.device)
        if self.runs_dense(q_len, kv_len):
            return BlockMask.from_dense(visible[None, None], q_len, kv_len, self.block, self.block, trusted=True)
        if self.tau > 0 and q_len < kv_len:
            raise ValueError(
                f"flexprefill takes no chunk of a prompt ({q_len} of {kv_len} tokens): prefill whole, or set flexprefill:tau=0"
            )
        rows = min(self.block, q_len)
        lines = torch.stack(line_scores(q, k, ctx.scale, rows)) / rows
        mass = block_sums(lines, self.block)
        count = self.line_blocks(lines)
        if self.tau > 0:
            # A head's kind is known to the GPU alone: the map is made for all heads, and taken where it applies.
            k_mean = block_mean(k, self.block).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            aware = js_distance(pooled_estimate(q, k_mean, rows, ctx.scale), mass[0]) < self.tau
            count = count.where(~aware, self.min_blocks)
        if self.min_blocks == 0:
            count = count.maximum((count > 0).any(-1, keepdim=True).to(count.dtype))
        mass[..., 0] = float("inf")
        chosen = line_map(best_blocks(mass, count), q_len, kv_len, self.block)
        if self.tau > 0:
            add_pooled_map(chosen, aware, block_mean(q, self.block), k_mean, visible, ctx.scale, self.gamma)
        # Every row keeps the first key block and its own.
        trusted = self.min_blocks > 0
        return BlockMask.from_dense(chosen, q_len, kv_len, self.block, self.block, trusted=trusted)

    def line_blocks(self, lines: Tensor) -> Tensor:
        """How many blocks of lines a vertical-slash head keeps: mean probabilities [..., kv_len] -> int64 [...]."""
        covered = lines.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma
        most = -(-lines.shape[-1] // self.block)
        if self.max_budget is not None:
            most = min(most, -(-self.max_budget // self.block))
        return ((covered.sum(-1) + 1) // LINES_PER_BLOCK + 1).clamp(self.min_blocks, most)


def block_sums(lines: Tensor, block: int) -> Tensor:
    """Columns lines[0] and diagonals lines[1] [..., kv_len] summed over blocks -> [2, ..., N]: of keys from the first on, and
    of distances from the farthest on, so that a ragged block holds the last keys and the nearest distances."""
    missing = -lines.shape[-1] % block
    padded = torch.stack((F.pad(lines[0], (0, missing)), F.pad(lines[1], (missing, 0))))
    return padded.unflatten(-1, (-1, block)).sum(-1)


def pooled_estimate(q: Tensor, k_mean: Tensor, rows: int, scale: float) -> Tensor:
    """softmax(scale * mean of the last `rows` queries . mean keys): q [B, H, q_len, D], k_mean [B, H, N, D] -> [B, H, N]."""
    q_mean = q[:, :, -rows:].mean(2, keepdim=True, dtype=torch.float32) * scale
    return (q_mean @ k_mean.transpose(-1, -2)).squeeze(2).softmax(-1)


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) of distributions [..., N] -> [...]; not a number where
    an entry is 0."""
    middle = (p + q) / 2
    return ((p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2).sqrt()


def best_blocks(mass: Tensor, count: Tensor) -> Tensor:
    """bool [..., N]: the `count` [...] largest of mass [..., N]; ties go to the lower index."""
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(mass.shape[-1], device=mass.device) < count[..., None]
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def line_map(kept: Tensor, q_len: int, kv_len: int, block: int) -> Tensor:
    """Block map bool [B, H, NQ, NK] of the kept key blocks kept[0] [B, H, NK] and block distances kept[1] [B, H, NK]."""
    vertical, slash = kept
    offset = kv_len - q_len
    first = torch.arange(offset, kv_len, block, device=kept.device)
    key_block = torch.arange(vertical.shape[-1], device=kept.device)

    def slashes(query: Tensor) -> Tensor:
        distance = (query // block)[:, None] - key_block
        return slash[..., distance.clamp(min=0)] & (distance >= 0)

    chosen = slashes(first).logical_or_(vertical[:, :, None])
    if offset % block:
        chosen |= slashes((first + block).clamp(max=kv_len) - 1)
    return chosen


def add_pooled_map(
    chosen: Tensor, aware: Tensor, q_mean: Tensor, k_mean: Tensor, visible: Tensor, scale: float, gamma: float
) -> None:
    """Adds to the block map `chosen` bool [B, H, NQ, NK], where `aware` [B, H] holds, the entries of the causal softmax of
    scale * q_mean k_mean^T, largest first over the whole head, whose running sum stays within gamma x NQ, and block 0.

    q_mean [B, H, NQ, D], k_mean [B, H, NK, D], fp32; visible bool [NQ, NK]. Ties go to the earlier row, then key block.
    """
    batch, heads, rows, columns = chosen.shape
    step = max(SORTED_ENTRIES // (batch * rows * columns), 1)
    for h in range(0, heads, step):
        part = slice(h, h + step)
        logits = (q_mean[:, part] * scale) @ k_mean[:, part].transpose(-1, -2)
        p = logits.masked_fill_(~visible, float("-inf")).softmax(-1).flatten(-2)
        values, order = p.sort(dim=-1, descending=True, stable=True)
        within = values.cumsum(-1) <= gamma * rows
        kept = torch.zeros_like(within).scatter_(-1, order, within).view(chosen[:, part].shape)
        kept[..., 0, 0] = True
        chosen[:, part] |= kept & aware[:, part, None, None]
