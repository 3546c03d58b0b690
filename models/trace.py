"""What attention really ran inside attach(): pairs per layer and head, implementation, phases that fell back to dense."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import BlockMask


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

    def add(self, layer: int, phase: str, q: Tensor, mask: BlockMask, impl: str) -> None:
        """Count one call that ran `mask`. q: [B, H, q_len, D]."""
        pairs = mask.pairs().expand(q.shape[0], -1).sum(0)
        pairs = pairs.repeat_interleave(q.shape[1] // pairs.shape[0], output_size=q.shape[1])
        if phase not in self._selected:
            self._selected[phase] = torch.zeros(self.num_layers, q.shape[1], dtype=torch.int64, device=q.device)
        self._selected[phase][layer] += pairs.to(self._selected[phase].device)
        self._count(self._visible, layer, phase, q, mask.visible_pairs())
        self._impls.add(impl)

    def add_dense(self, layer: int, phase: str, q: Tensor, kv_len: int, missing: bool = False) -> None:
        """Count one call that ran dense; missing: because the method does not have the phase."""
        q_len = q.shape[2]
        visible = q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2
        for counts in (self._visible, self._dense):
            self._count(counts, layer, phase, q, visible)
        self._impls.add("sdpa")
        if missing:
            self.dense_phases.add(phase)

    def _count(self, counts: dict[str, list[int]], layer: int, phase: str, q: Tensor, pairs: int) -> None:
        counts.setdefault(phase, [0] * self.num_layers)[layer] += q.shape[0] * pairs
        self._heads = q.shape[1]

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

    @property
    def impl(self) -> str:
        """What ran: "triton", "reference" (BlockMasks) or "sdpa" (dense), joined by "+" where several did; "" for nothing."""
        return "+".join(sorted(self._impls))
