"""What attention really ran inside attach(): pairs per layer and head, implementation, phases that fell back to dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import BlockMask

QUESTION = 64  # last tokens of a prompt, which hold the question


class Trace:
    """Counts (query, key) pairs, per phase; nothing syncs with the GPU until a density is read."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._selected: dict[str, Tensor] = {}  # phase -> int64 [layers, H], sparse calls only
        self._dense: dict[str, list[int]] = {}  # phase -> pairs of one head, by layer, of calls that ran dense
        self._visible: dict[str, list[int]] = {}
        self._heads = 0
        self._impls: set[str] = set()
        self.dense_phases: set[str] = set()  # phases that the method does not have
        self._question: dict[int, Tensor | float] = {}  # layer -> density [H] of the first prompt's last rows

    def add(self, layer: int, phase: str, q: Tensor, mask: BlockMask, impl: str) -> None:
        """Count one call that ran `mask`. q: [B, H, q_len, D]."""
        pairs = mask.pairs().expand(q.shape[0], -1).sum(0)
        pairs = pairs.repeat_interleave(q.shape[1] // pairs.shape[0], output_size=q.shape[1])
        if phase not in self._selected:
            self._selected[phase] = torch.zeros(self.num_layers, q.shape[1], dtype=torch.int64, device=q.device)
        self._selected[phase][layer] += pairs.to(self._selected[phase].device)
        self._count(self._visible, layer, phase, q, q.shape[0] * mask.visible_pairs())
        self._impls.add(impl)
        if phase == "prefill" and layer not in self._question:
            rows = mask.kv_num_blocks.shape[2]
            density = mask.rows(max(rows - -(-QUESTION // mask.q_block), 0), rows).density().mean(0)
            self._question[layer] = density.repeat_interleave(q.shape[1] // density.shape[0], output_size=q.shape[1])

    def add_dense(self, layer: int, phase: str, q: Tensor, pairs: int, missing: bool = False) -> None:
        """Count one call that ran dense on `pairs` (query, key) pairs, the whole batch's; missing: because the method does not
        have the phase."""
        for counts in (self._visible, self._dense):
            self._count(counts, layer, phase, q, pairs)
        self._impls.add("sdpa")
        if missing:
            self.dense_phases.add(phase)
        if phase == "prefill":
            self._question.setdefault(layer, 1.0)

    def _count(self, counts: dict[str, list[int]], layer: int, phase: str, q: Tensor, pairs: int) -> None:
        counts.setdefault(phase, [0] * self.num_layers)[layer] += pairs
        self._heads = q.shape[1]

    def state(self) -> dict[str, Any]:
        """Everything counted so far as JSON values, for restore(). Syncs with the GPU."""
        counted = {"dense": self._dense, "visible": self._visible, "heads": self._heads, "impls": sorted(self._impls)}
        counted |= {"selected": {phase: pairs.tolist() for phase, pairs in self._selected.items()}}
        question = [[layer, torch.as_tensor(density).tolist()] for layer, density in self._question.items()]
        return counted | {"dense_phases": sorted(self.dense_phases), "question": question}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a state() of the same model and method."""
        self._dense, self._visible, self._heads = state["dense"], state["visible"], state["heads"]
        self._impls, self.dense_phases = set(state["impls"]), set(state["dense_phases"])
        self._selected = {phase: torch.tensor(pairs, device=device) for phase, pairs in state["selected"].items()}
        self._question = {layer: torch.tensor(density, device=device) for layer, density in state["question"]}

    def density_of(self, phase: str) -> Tensor:
        """Selected / causally visible pairs over all calls of a phase, float64 [layers, H] on the CPU; NaN for layers that
        did not run. Raises: ValueError when the phase did not run at all."""
        if phase not in self._visible:
            raise ValueError(f"no {phase} ran: there is no density to read")
        selected = torch.tensor(self._dense.get(phase, [0] * self.num_layers))[:, None].expand(-1, self._heads)
        if phase in self._selected:
            selected = selected + self._selected[phase].cpu()
        return selected.double() / torch.tensor(self._visible[phase])[:, None]

    @property
    def density(self) -> Tensor:
        """density_of("prefill")."""
        return self.density_of("prefill")

    @property
    def mean_density(self) -> float:
        """Mean prefill density, every head of every layer with equal weight."""
        return float(self.density.nanmean())

    def question(self) -> dict[str, Any]:
        """How the last rows (64 or more) of the first prompt, which hold the question, were read: `question` "dense", "sparse"
        or "partly dense" (in some heads), `question_density` their selected / visible pairs, mean over heads and layers."""
        heads = [torch.as_tensor(density).double().expand(self._heads).cpu() for density in self._question.values()]
        density = torch.stack(heads)
        dense = density > 1 - 1e-9
        word = "dense" if dense.all() else "partly dense" if dense.any() else "sparse"
        return {"question": word, "question_density": float(density.mean())}

    @property
    def impl(self) -> str:
        """What ran: "triton", "reference" (BlockMasks) or "sdpa" (dense), joined by "+" where several did; "" for nothing."""
        return "+".join(sorted(self._impls))
