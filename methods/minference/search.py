"""The offline head search: which vertical and slash budgets every head of a model gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...kernels.block_mass import attention_map
from ...kernels.line_scores import line_scores
from ...models.calibrate import visit
from ..base import LayerContext, ModelSpec
from ..per_head import command
from . import FORCED_VERTICAL, LAST_QUERIES, top_lines

FIRST_ROW = 2500  # mass is counted from this query on; from the middle when the text is shorter than twice that
FORCED_SLASH = 30  # the search forces fewer nearest diagonals than the run


class Candidate(NamedTuple):
    vertical: int
    slash: int
    static: bool = False  # A-shape: the first `vertical` keys and the nearest `slash` diagonals


# Source: MInference's search space, of about equal cost on its kernels. It also has block-sparse heads, which its own
# configurations rewrite to the default budgets; they are left out.
GRID = (Candidate(30, 800), Candidate(100, 750), Candidate(500, 700), Candidate(3500, 100), Candidate(100, 800, static=True))


def kept_mass(q: Tensor, k: Tensor, scale: float, candidates: Sequence[Candidate]) -> Tensor:
    """Mean attention mass a query keeps under each candidate's lines, exact in tokens, fp32 [candidates, H].

    q [B, H, L, D], k [B, H_kv, L, D] of a whole prompt. Counted over the queries from 2500 on, or over the second half of a
    prompt below 5000 tokens, where a candidate's lines do not yet cover nearly all keys.
    Raises: ValueError when q and k differ in length.
    """
    length = q.shape[2]
    if k.shape[2] != length:
        raise ValueError(f"the head search needs a whole prompt, got {length} queries and {k.shape[2]} keys")
    lines = [_lines(*line_scores(q, k, scale, LAST_QUERIES), candidate) for candidate in candidates]
    first = min(FIRST_ROW, length // 2)
    total = torch.zeros(len(candidates), q.shape[1], device=q.device)
    for heads, start, p in attention_map(q, k, scale, first_row=first):
        rows, keys = p.shape[2:]
        p = p.flip(2)
        for c, (vertical, slash) in enumerate(lines):
            kept = _diagonals(slash[:, heads], start + rows, rows) | vertical[:, heads, None, :keys]
            total[c, heads] += (p * kept).sum((0, 2, 3))
    return total / (q.shape[0] * (length - first))


def _lines(vertical: Tensor, slash: Tensor, candidate: Candidate) -> tuple[Tensor, Tensor]:
    """The candidate's columns and distances, bool [B, H, L] each, from the scores of line_scores()."""
    if candidate.static:
        line = torch.arange(vertical.shape[-1], device=vertical.device)
        return (line < candidate.vertical).expand(vertical.shape), (line < candidate.slash).expand(slash.shape)
    forced = [scores.clone() for scores in (vertical, slash)]
    forced[0][..., :FORCED_VERTICAL] = float("inf")
    forced[1][..., :FORCED_SLASH] = float("inf")
    heads = vertical.shape[1]
    return top_lines(forced[0], (candidate.vertical,) * heads), top_lines(forced[1], (candidate.slash,) * heads)


def _diagonals(slash: Tensor, end: int, rows: int) -> Tensor:
    """bool view [B, H, rows, end] of slash [B, H, L]: row r, key j is slash[i - j] for query i = end - 1 - r (from the last
    query up), False for j > i."""
    length = slash.shape[-1]
    reverse = torch.nn.functional.pad(slash.flip(-1), (0, rows))
    batch, heads, width = reverse.shape
    # reverse[length - 1 - (i - j)]: one element further for the next key and for the next row up.
    return reverse.as_strided((batch, heads, rows, end), (heads * width, width, 1, 1), length - end)


def search(model: Any, spec: ModelSpec, documents: list[list[int]]) -> dict[str, Any]:
    """The content of a MInference.config file: every head's best candidate by mean kept mass over the documents (token ids).

    Raises: ValueError for a document so short that the candidate with the most columns keeps nearly all of its keys.
    """
    least = 2 * max(candidate.vertical for candidate in GRID)
    shortest = min(len(ids) for ids in documents)
    if shortest < least:
        raise ValueError(f"the head search needs at least {least} tokens a document, got {shortest}: use --ctx 8k or more")
    mass = torch.zeros(spec.layers, len(GRID), spec.heads)

    def look(q: Tensor, k: Tensor, ctx: LayerContext) -> None:
        mass[ctx.layer] += kept_mass(q, k, ctx.scale, GRID).to(mass)

    visit(model, tqdm(documents, desc="search", unit="document"), look)
    best = [[GRID[i] for i in layer.argmax(0).tolist()] for layer in mass]
    return {"model": spec.name, "layers": [[[head.vertical, head.slash] for head in layer] for layer in best]}


def main(argv: list[str] | None = None) -> int:
    def summary(found: dict[str, Any]) -> str:
        heads = [tuple(head) for layer in found["layers"] for head in layer]
        return ", ".join(f"({c.vertical}, {c.slash}) x {heads.count((c.vertical, c.slash))}" for c in GRID)

    return command(
        argv, "minference", "Search every head's vertical and slash budgets; the paper searches at 32k tokens.",
        "JSON file for minference:config=FILE", search, summary,
    )  # fmt: skip
