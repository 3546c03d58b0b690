"""MInference's vertical-slash attention (Jiang et al. 2024, arXiv 2407.02490; code at microsoft/MInference fb56c91)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import BlockMask
from ...kernels.line_scores import line_scores
from ...kernels.vertical_slash import vertical_slash_mask
from ..base import LayerContext, check_fields, register
from ..per_head import SearchedMethod, on_device

LAST_QUERIES = 64  # the queries whose attention ranks the lines
MIN_VERTICAL, MIN_SLASH = 30, 50  # fewest lines of a head
FORCED_VERTICAL, FORCED_SLASH = 30, 100  # first keys and nearest diagonals ranked before all others

Budget = tuple[int, int]  # (vertical, slash)


@register
@dataclass(frozen=True)
class MInference(SearchedMethod):
    """Every head keeps its best `vertical` key columns and `slash` diagonals, ranked by the attention of the last 64 queries.

    Source: Jiang et al. 2024 (arXiv 2407.02490), Algorithm 2, as its code runs (microsoft/MInference fb56c91).
    The lines run as 64-token blocks over the slashes plus single columns (kernels/vertical_slash.py), which covers 1.1 to 2.6
    times the pairs of the lines themselves: density is what ran. The defaults are the code's for a head that was not
    searched; they are near-dense below 16k tokens.

    `config` is a JSON file with the budgets of every head, as `python -m sparsebench.methods.minference` writes it:
        {"model": name, "layers": [[[vertical, slash] or null, ... one per query head], ... one per layer]}
    A null head or layer has the fields' budgets. `scale` multiplies all budgets; 30 verticals and 50 slashes are the least.

    The paper has three kinds of heads (A-shape, vertical-slash, block-sparse); 13 of the 14 configurations that the code ships
    are vertical-slash alone, and its search runs A-shape winners as vertical-slash and gives block-sparse winners (1000, 6096),
    so this is vertical-slash alone (`a_shape` and `block_topk` are methods of their own). The first 30 columns and the nearest
    100 diagonals come before all others (30 diagonals in the search). The lines of a higher `scale` hold those of a lower one;
    the tokens need not, because merged blocks fall elsewhere.

    Lines are ranked once per forward pass by its last queries, so an early query's keys depend on later tokens (as in the
    authors' code), and a chunk of a chunked prefill is ranked by its own last 64 queries.
    """

    name = "minference"
    paper = "Jiang et al. 2024, arXiv 2407.02490"
    cost = "64 L D products, two sorts of L"
    knob = "scale"
    knob_range = (0.005, 64.0)
    knob_log = True
    file_field, form = "config", "[vertical, slash]"

    vertical: int = 1000  # key columns
    slash: int = 6096  # diagonals
    config: str | None = None  # per-head file
    scale: float = 1.0  # of all budgets

    def __post_init__(self):
        check_fields(self, vertical=(1, math.inf), slash=(1, math.inf), scale=(0.0, math.inf))

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        vertical, slash = line_scores(q, k, ctx.scale, LAST_QUERIES)
        vertical[..., :FORCED_VERTICAL] = float("inf")
        slash[..., :FORCED_SLASH] = float("inf")
        budgets = self.budgets(ctx.layer, q.shape[1], k.shape[2])
        verticals, slashes = ([budget[i] for budget in budgets] for i in (0, 1))
        return vertical_slash_mask(
            top_lines(vertical, tuple(verticals)), top_lines(slash, tuple(slashes)), max(verticals), max(slashes), q.shape[2]
        )

    def budgets(self, layer: int, heads: int, kv_len: int) -> list[Budget]:
        """(vertical, slash) that run in every query head of a layer. Raises: ValueError when `config` does not fit."""
        own = (self.vertical, self.slash)
        floors = (MIN_VERTICAL, MIN_SLASH)
        return [
            tuple(min(max(round(lines * self.scale), floor), kv_len) for lines, floor in zip(budget or own, floors))  # type: ignore[misc]
            for budget in self.of_layer(layer, heads)
        ]

    @staticmethod
    def parse_head(head: Any) -> Budget:
        vertical, slash = head
        if not (type(vertical) is type(slash) is int and vertical > 0 and slash > 0):
            raise ValueError(f"{head} is no pair of positive integers")
        return vertical, slash

    @property
    def note(self) -> str:
        return "" if self.config else "every head has the default budgets (no head search)"


def top_lines(scores: Tensor, budgets: tuple[int, ...]) -> Tensor:
    """bool [B, H, n]: the budgets[h] best of every head of scores [B, H, n]; ties go to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : max(budgets)]
    rank = torch.arange(order.shape[-1], device=scores.device)
    if min(budgets) == max(budgets):
        kept = (rank >= 0).expand(order.shape)
    else:
        kept = (rank < on_device(budgets, scores.device)[:, None]).expand(order.shape)
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, kept)
