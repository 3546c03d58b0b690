"""The offline search: which threshold every head of a model gets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...kernels.antidiagonal import antidiagonal_mass
from ...kernels.block_mass import block_mass
from ...kernels.selection import block_pairs
from ...models.calibrate import visit
from ..base import LayerContext, ModelSpec
from ..per_head import command, on_device
from . import XAttention

CANDIDATES = tuple(i / 20 for i in range(19, 3, -1))  # 0.95 down to 0.2; of equal ones the first is taken
UNITS = 200  # of density, in which the budget is counted


def measure(q: Tensor, k: Tensor, scale: float, method: XAttention, candidates: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Mean attention mass that a query keeps, and density, at every candidate threshold: fp32 [candidates, H] each.

    q [B, H, L, D], k [B, H_kv, L, D] of a whole prompt. Raises: ValueError when they differ in length.
    """
    heads, length = q.shape[1:3]
    if k.shape[2] != length:
        raise ValueError(f"the threshold search needs a whole prompt, got {length} queries and {k.shape[2]} keys")
    attention = block_mass(q, k, scale, method.block, method.block) / (q.shape[0] * length)
    pairs = block_pairs(length, length, method.block, method.block, q.device)
    share = pairs / (q.shape[0] * pairs.sum())
    mass = antidiagonal_mass(q, k, scale, method.stride, method.block)
    kept, density = [], []
    for candidate in candidates:
        chosen = method.choose(mass, on_device((candidate,) * heads, q.device), length, length)
        kept.append(attention.where(chosen, 0).sum((0, 2, 3)))
        density.append(share.where(chosen, 0).sum((0, 2, 3)))
    return torch.stack(kept), torch.stack(density)


def best_choice(kept: Tensor, cost: Tensor, budget: int) -> list[int]:
    """Which option every head takes, so that they keep most together and cost at most `budget` together.

    kept: [options, heads];  cost: int64 [options, heads]. Dynamic programming over the heads: the best of the first h heads at
    cost m is that of the first h - 1 at m less the h-th one's cost, and what the h-th one keeps.
    """
    best = torch.zeros(budget + 1, dtype=torch.float64)
    choices = []
    for values, costs in zip(kept.T.tolist(), cost.T.tolist()):
        ways = [F.pad(best, (c, 0), value=float("-inf"))[: budget + 1] + value for value, c in zip(values, costs)]
        best, choice = torch.stack(ways).max(0)
        choices.append(choice.to(torch.int8))
    taken = []
    for head in reversed(range(len(choices))):
        taken.append(int(choices[head][budget]))
        budget -= int(cost[taken[-1], head])
    return taken[::-1]


def search(model: Any, spec: ModelSpec, documents: list[list[int]], stride: int, threshold: float) -> dict[str, Any]:
    """The content of an XAttention.thresholds file, from the documents (token ids).

    The heads keep the most attention mass together, in the mean of the documents, that can be had at the density of one
    `threshold` in all of them.

    Source: the dynamic programming of arXiv 2503.16428, section 2.3, with other measures. There a head's threshold goes down
    from 0.9 by a tenth at a time, the budget is a number of such steps, 1000 for a model of 1024 heads, and the gain is the
    accuracy of the whole model: a run of a benchmark for every head and step, for which no program was published. Here one
    pass over a text measures the kept mass for all heads, and the budget is density: steps would all go to heads that keep
    the same blocks at any threshold. The authors' repository has another rule (profile_threshold.py): the share at which a
    selection holds every block of the fewest that have 90 % of a row's mass, which has no bound on density.

    Raises: ValueError for a stride or threshold that XAttention refuses, or a document of a single block.
    """
    method = XAttention(stride=stride, threshold=threshold)
    shortest = min(len(ids) for ids in documents)
    if shortest <= method.block:
        raise ValueError(f"the threshold search needs more than {method.block} tokens a document, got {shortest}")
    candidates = tuple(sorted({*CANDIDATES, threshold}, reverse=True))
    kept, density = torch.zeros(2, spec.layers, len(candidates), spec.heads)

    def look(q: Tensor, k: Tensor, ctx: LayerContext) -> None:
        for total, found in zip((kept, density), measure(q, k, ctx.scale, method, candidates)):
            total[ctx.layer] += found.to(total) / len(documents)

    visit(model, tqdm(documents, desc="search", unit="document"), look)
    heads = spec.layers * spec.heads
    gain, cost = (x.transpose(0, 1).reshape(-1, heads) for x in (kept, (density * UNITS).round().long()))
    taken = best_choice(gain, cost, int(cost[candidates.index(threshold)].sum()))
    thresholds = [candidates[i] for i in taken]
    layers = [thresholds[i : i + spec.heads] for i in range(0, heads, spec.heads)]
    return {"model": spec.name, "stride": stride, "layers": layers}


def main(argv: list[str] | None = None) -> int:
    def summary(found: dict[str, Any]) -> str:
        values = [value for layer in found["layers"] for value in layer]
        return f"thresholds from {min(values):g} to {max(values):g}, {sum(values) / len(values):.3f} in the mean"

    return command(
        argv, "xattention", "Search every head's threshold.", "JSON file for xattention:thresholds=FILE", search, summary,
        {
            "stride": dict(type=int, default=XAttention.stride, help="tokens, as xattention:stride will be"),
            "threshold": dict(type=float, default=0.8, help="in all heads, would cost as much as what is searched for"),
        },
    )  # fmt: skip
