"""What attention really ran inside attach(): pairs per layer and head, implementation, phases that fell back to dense."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..kernels import BlockMask, visible_pairs
from ..kernels.pair_counts import add_pairs

QUESTION = 64  # last tokens of a prompt, which hold the question

Place = tuple[str, int]  # phase, layer


class Trace:
    """Counts (query, key) pairs, per phase; nothing syncs with the GPU until a density is read."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        # (phase, layer, heads of the mask) -> int64 [2, heads]: selected pairs of all rows, and of the last ones
        self._selected: dict[tuple[str, int, int], Tensor] = {}
        # The same of one head, in calls that ran dense, and causally visible in all calls.
        self._dense: dict[Place, list[int]] = defaultdict(lambda: [0, 0])
        self._visible: dict[Place, list[int]] = defaultdict(lambda: [0, 0])
        self._heads = 0
        self._impls: set[str] = set()
        self.dense_phases: set[str] = set()  # phases that the method does not have

    def add(self, layer: int, phase: str, q: Tensor, mask: BlockMask, impl: str) -> None:
        """Count one call that ran `mask`. q: [B, H, q_len, D]."""
        batch, heads, rows = mask.kv_num_blocks.shape
        counts = self._selected.get((phase, layer, heads))
        if counts is None:
            counts = torch.zeros(2, heads, dtype=torch.int64, device=q.device)
            self._selected[phase, layer, heads] = counts
        tail = min(-(-QUESTION // mask.q_block), rows)
        add_pairs(mask, counts, tail, weight=q.shape[0] // batch)
        last = mask.q_len - (rows - tail) * mask.q_block
        visible = self._visible[phase, layer]
        visible[0] += q.shape[0] * mask.visible_pairs()
        visible[1] += q.shape[0] * visible_pairs(last, mask.kv_len)
        self._heads = q.shape[1]
        self._impls.add(impl)

    def add_dense(self, layer: int, phase: str, q: Tensor, pairs: int, missing: bool = False) -> None:
        """Count one call that ran dense on `pairs` (query, key) pairs, the whole batch's; missing: because the method does not
        have the phase. All of its rows count as the last ones."""
        for counts in (self._visible[phase, layer], self._dense[phase, layer]):
            counts[0] += pairs
            counts[1] += pairs
        self._heads = q.shape[1]
        self._impls.add("sdpa")
        if missing:
            self.dense_phases.add(phase)

    def _density(self, phase: str, part: int) -> Tensor:
        selected = torch.zeros(self.num_layers, self._heads, dtype=torch.int64)
        visible = torch.zeros(self.num_layers, 1, dtype=torch.int64)
        for (ran, layer), counts in self._visible.items():
            if ran == phase:
                visible[layer] += counts[part]
                selected[layer] += self._dense[ran, layer][part] if (ran, layer) in self._dense else 0
        for (ran, layer, heads), pairs in self._selected.items():
            if ran == phase:
                selected[layer] += pairs[part].cpu().repeat_interleave(self._heads // heads)
        return selected.double() / visible

    def density_of(self, phase: str) -> Tensor:
        """Selected / causally visible pairs over all calls of a phase, float64 [layers, H] on the CPU; NaN for layers that
        did not run. Raises: ValueError when the phase did not run at all."""
        if not any(ran == phase for ran, _ in self._visible):
            raise ValueError(f"no {phase} ran: there is no density to read")
        return self._density(phase, 0)

    @property
    def density(self) -> Tensor:
        """density_of("prefill")."""
        return self.density_of("prefill")

    @property
    def mean_density(self) -> float:
        """Mean prefill density, every head of every layer with equal weight."""
        return float(self.density.nanmean())

    def question(self) -> dict[str, Any]:
        """How the last rows (64 or more) of the prompts, which hold the question, were read: `question` "dense", "sparse" or
        "partly dense" (in some heads), `question_density` their selected / visible pairs, mean over heads and layers."""
        density = self._density("prefill", 1)
        density = density[~density.isnan()]
        dense = density > 1 - 1e-9
        word = "dense" if dense.all() else "partly dense" if dense.any() else "sparse"
        return {"question": word, "question_density": float(density.mean())}

    @property
    def impl(self) -> str:
        """What ran: "triton", "reference" (BlockMasks) or "sdpa" (dense), joined by "+" where several did; "" for nothing."""
        return "+".join(sorted(self._impls))

    def state(self) -> dict[str, Any]:
        """Everything counted so far as JSON values, for restore(). Syncs with the GPU."""
        counted: dict[str, Any] = {
            "heads": self._heads,
            "impls": sorted(self._impls),
            "dense_phases": sorted(self.dense_phases),
        }
        counted |= {"dense": [[*place, counts] for place, counts in self._dense.items()]}
        counted |= {"visible": [[*place, counts] for place, counts in self._visible.items()]}
        return counted | {"selected": [[*place, pairs.tolist()] for place, pairs in self._selected.items()]}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state() of the same model and method."""
        self._heads, self._impls, self.dense_phases = state["heads"], set(state["impls"]), set(state["dense_phases"])
        self._dense.update({(phase, layer): counts for phase, layer, counts in state["dense"]})
        self._visible.update({(phase, layer): counts for phase, layer, counts in state["visible"]})
        self._selected = {(p, layer, h): torch.tensor(pairs, device=device) for p, layer, h, pairs in state["selected"]}
