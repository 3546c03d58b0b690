"""XAttention's antidiagonal block selection (Xu et al. 2025, arXiv 2503.16428; code at mit-han-lab/x-attention e379887)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import BlockMask
from ...kernels.antidiagonal import antidiagonal_mass
from ...kernels.block_lists import SCRATCH_ELEMENTS
from ..base import LayerContext, register
from ..per_head import SearchedMethod, on_device

BLOCKS = (64, 128)  # query blocks that the sparse attention kernel runs with
LEAST_CHUNK = 2048  # tokens
CHUNK_PAIRS = 1 << 28  # chunk x kv_len of long prompts


@register
@dataclass(frozen=True)
class XAttention(SearchedMethod):
    """Every row of blocks keeps its best ones by antidiagonal sums until they hold a share `threshold` of the row's mass.

    A block's score is its softmax mass in the map of antidiagonal sums of stride `stride` (kernels/antidiagonal.py): the
    tokens of a prompt that ends inside a group of `stride` count as if zeros followed, groups of nothing but zeros do not
    count. From the scores, with blocks in descending order and ties to the earlier one:

    - rule="paper": key block 0 and the row's own block are kept and counted, then the fewest further blocks until the share is
      reached (section 2.2).
    - rule="code": what the authors' code does. It cuts the prompt into chunks of the power of 2 that reaches kv_len, at most
      2^28 / that power and at least 2048 tokens (so one chunk up to 16k tokens, 8192 at 32k, 2048 at 128k). In rows of the
      first chunk only the row's own block is forced and counted, one block more than needed is kept, and block 0 is always on
      without its mass being counted unless it has earned its place. Rows of later chunks follow rule="paper". `chunk` sets
      another size.

    Other differences: a threshold of 1 keeps every block, also one whose mass vanishes in rounding. On GPUs other than the
    A100, H100 and the like the authors' code gives rows of later chunks no mass on earlier ones when the prompt fills its
    last chunk up to less than `stride` tokens; that is a slip of an index and not repeated.

    `thresholds` is a JSON file with the threshold of every query head, as `python -m sparsebench.methods.xattention` writes
    it: {"model": name, "stride": tokens, "layers": [[threshold or null, ...] or null, ...]}. `threshold` stands in for null,
    and turning it as the knob is no option then. The paper's headline results use searched thresholds, 0.8 in the mean.

    In chunked prefill a row keeps what it would keep in a prompt that ends with the call, exact where q starts at a multiple
    of `block`; elsewhere rows are counted from q's first one and both blocks they lie in are their own. For chunks that start
    and end at multiples of `block` that is the whole prompt's choice, unless rule="code" cuts the longer prompt otherwise.
    """

    name = "xattention"
    paper = "Xu et al. 2025, arXiv 2503.16428"
    cost = "L^2 D / (2 stride) products, N sorts of N"
    knob = "threshold"
    knob_range = (0.01, 1.0)
    file_field, form = "thresholds", "threshold"

    stride: int = 8  # tokens, a power of 2
    threshold: float = 0.9  # share of a row's mass kept
    thresholds: str | None = None  # per-head file
    block: int = 128  # tokens
    rule: str = "code"  # "code" or "paper"
    chunk: int | None = None  # tokens

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"xattention:threshold={self.threshold} is out of range (0, 1]")
        if self.block not in BLOCKS:
            raise ValueError(f"xattention:block={self.block} is neither 64 nor 128")
        if self.stride < 1 or self.block % self.stride:
            raise ValueError(f"xattention:stride={self.stride} is no power of 2 up to block={self.block}")
        if self.rule not in ("code", "paper"):
            raise ValueError(f"xattention:rule={self.rule} is neither code nor paper")
        if self.chunk is not None and (self.chunk < 1 or self.chunk % self.block):
            raise ValueError(f"xattention:chunk={self.chunk} is no multiple of block={self.block}")
        if self.chunk is not None and self.rule == "paper":
            raise ValueError("xattention:chunk is for rule=code, rule=paper has no chunks")
        if self.thresholds is not None:
            object.__setattr__(self, "knob", None)

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        q_len, kv_len = q.shape[2], k.shape[2]
        mass = antidiagonal_mass(q, k, ctx.scale, self.stride, self.block)
        thresholds = on_device(self.of_heads(ctx.layer, q.shape[1]), q.device)
        kept = self.choose(mass, thresholds, q_len, kv_len)
        return BlockMask.from_dense(kept, q_len, kv_len, self.block, self.block, trusted=True)

    def choose(self, mass: Tensor, thresholds: Tensor, q_len: int, kv_len: int) -> Tensor:
        """The blocks kept at thresholds fp64 [H], from their antidiagonal mass: fp32 -> bool, both [B, H, NQ, NK]."""
        start = torch.arange(kv_len - q_len, kv_len, self.block, device=mass.device)
        end = (start + self.block).clamp(max=kv_len)
        key = self.block * torch.arange(mass.shape[3], device=mass.device)
        forced = (key < end[:, None]) & (key + self.block > start[:, None])
        first_chunk = start < (0 if self.rule == "paper" else self.chunk or code_chunk(kv_len))
        forced[:, 0] |= ~first_chunk
        kept = reach_threshold(mass, thresholds, forced, first_chunk)
        kept[..., 0] = True
        return kept

    def of_heads(self, layer: int, heads: int) -> tuple[float, ...]:
        """The threshold of every query head of a layer. Raises: ValueError when `thresholds` does not fit."""
        return tuple(float(self.threshold if found is None else found) for found in self.of_layer(layer, heads))

    @staticmethod
    def parse_head(head: Any) -> float:
        if isinstance(head, bool) or not isinstance(head, int | float) or not 0 < head <= 1:
            raise ValueError(f"{head} is no threshold in (0, 1]")
        return float(head)

    @property
    def note(self) -> str:
        searched = self.searched
        if searched is None:
            return f"every head has threshold {self.threshold:g} (no per-head search)"
        stride = searched.content.get("stride", self.stride)
        return "" if stride == self.stride else f"the thresholds were searched at stride {stride}, not {self.stride}"


def code_chunk(kv_len: int) -> int:
    """Tokens of a chunk in the authors' code."""
    power = 1 << (kv_len - 1).bit_length()
    return max(min(power, CHUNK_PAIRS // power), LEAST_CHUNK)


def reach_threshold(mass: Tensor, thresholds: Tensor, forced: Tensor, one_more: Tensor) -> Tensor:
    """The forced blocks, and of the others as many of the best as bring the kept mass to the threshold.

    Args: mass: fp32 [B, H, NQ, NK];  thresholds: fp64 [H], shares of a row's mass, 1 keeps all;  forced: bool [NQ, NK];
    one_more: bool [NQ], rows that keep one block more than needed.
    Returns: bool [B, H, NQ, NK]. Sums are fp64, in descending order.
    """
    kept = torch.empty_like(mass, dtype=torch.bool)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    step = max(SCRATCH_ELEMENTS // mass[:, 0].numel(), 1)
    for h in range(0, mass.shape[1], step):
        part, share = mass[:, h : h + step], thresholds[h : h + step, None]
        needed = part.sum(-1, dtype=torch.float64) * share
        needed = needed.masked_fill(share >= 1, float("inf"))
        counted = part.where(forced, 0).sum(-1, dtype=torch.float64)
        others, order = part.masked_fill(forced, 0).sort(dim=-1, descending=True, stable=True)
        short = counted[..., None] + others.cumsum(-1, dtype=torch.float64) < needed[..., None]
        number = (short.sum(-1) + 1).where(counted < needed, 0) + one_more
        kept[:, h : h + step].scatter_(-1, order, rank < number[..., None])
    return kept.logical_or_(forced)
