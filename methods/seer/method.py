"""SeerAttention (Gao et al. 2024, arXiv 2410.13276; microsoft/SeerAttention aba03e3), prefill."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import BlockMask, causal_blocks
from ...kernels.selection import top_blocks
from ..base import LayerContext, Method, ModelSpec, check_fields, register
from .gate import AttnGate
from .weights import LayerGates, load_gates, shipped_gate

SCRATCH_BYTES = 2**28  # of fp32 scores at a time: 16 heads of 128k tokens in blocks of 64 take 268 MB
KNOBS = {
    # field: (sparsest, densest, whether the values in between lie on a log scale)
    "threshold": (1.0, 1e-12, True),
    "nz_ratio": (0.0, 1.0, False),
    "budget": (1.0, 16384.0, True),
    "top_p": (0.0, 1.0, False),
}
TRAIN = "python -m sparsebench.methods.seer.distill --model NAME --data file:PATH --out PATH"
HOW_TO_GET = f"give one with seer:gate=PATH, or train one: {TRAIN}"


@register
@dataclass(frozen=True)
class Seer(Method):
    """A trained gate (AttnGate) scores every key block from q and k before RoPE.

    Source: Gao et al. 2024 (arXiv 2410.13276), section 3, as its prefill code runs (microsoft/SeerAttention aba03e3).
    S = softmax(block-causal gate logits), fp32.

    At most one of four fields says what a row keeps (none means threshold=2e-3; the paper's 5e-4 on RULER, 2e-3 on LongBench):
        threshold   blocks with S > threshold (strict)
        nz_ratio    the best int((1 - sqrt(1 - nz_ratio)) * NK) blocks, at least 1
        budget      the best `budget` blocks (early rows: all there are)
        top_p       the fewest best blocks whose S sums to at least top_p
    gate: folder or file of trained gates, one AttnGate for every layer, or None for the gate shipped for the model.
    last_dense: query blocks at the end that attend to everything (in chunked prefill: at the end of each chunk).
    share_gqa: one selection per KV head, from the mean of S over its query heads.
    diagonal: always keep a row's own block (counted in nz_ratio and budget).

    The authors' code: nz_ratio counts the same number in every row and cuts at the diagonal afterwards, so early rows keep
    fewer; "last block dense" makes the last two dense; the diagonal is not forced. Ours: a row whose first query would see
    nothing keeps the block of that query, where theirs would divide zero by zero.
    """

    name = "seer"
    paper = "Gao et al. 2024, arXiv 2410.13276"
    cost = "O(L D + N^2 D)"
    knob = "threshold"  # an instance carries the name, range and scale of the one it uses
    knob_range = KNOBS["threshold"][:2]
    knob_log = KNOBS["threshold"][2]
    needs = "training"

    gate: str | Path | AttnGate | LayerGates | None = None  # None: the one shipped for the model
    threshold: float | None = None  # on S
    nz_ratio: float | None = None  # share of all blocks
    budget: int | None = None  # blocks per row
    top_p: float | None = None  # share of S
    last_dense: int = 2  # query blocks
    share_gqa: bool = False
    diagonal: bool = False

    def __post_init__(self):
        chosen = [name for name in KNOBS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"seer takes one of {', '.join(KNOBS)}; got {' and '.join(chosen)}")
        most = float("inf")
        check_fields(self, threshold=(-1, 1), nz_ratio=(0, 1), budget=(1, most), top_p=(0, 1), last_dense=(0, most))
        knob = chosen[0] if chosen else "threshold"
        for name, value in (("knob", knob), ("knob_range", KNOBS[knob][:2]), ("knob_log", KNOBS[knob][2])):
            object.__setattr__(self, name, value)

    def prepare(self, model: ModelSpec) -> Seer:
        """With the gates of all layers loaded. Raises: ValueError when there is no gate or it is another model's."""
        if isinstance(self.gate, LayerGates):
            self.gate.check(model)
            return self
        if isinstance(self.gate, AttnGate):
            return replace(self, gate=LayerGates([copy.deepcopy(self.gate)], source="AttnGate").check(model))
        if self.gate is not None:
            return replace(self, gate=load_gates(self.gate, model, source=str(self.gate)))
        if not shipped_gate(model.name).is_dir():
            raise ValueError(f"no trained gate ships for {model.name}; {HOW_TO_GET}")
        return replace(self, gate=load_gates(shipped_gate(model.name), model))

    def files(self, model_name: str) -> list[Path]:
        if isinstance(self.gate, (str, Path)):
            return [Path(self.gate).expanduser()]
        return [shipped_gate(model_name)] if self.gate is None else []

    def synthetic(self, model: ModelSpec, seed: int) -> Seer:
        """With a random gate of the released kind, and nz_ratio=0.1 where no field chooses: random scores have no threshold."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gate = AttnGate("Qavg_Kmaxminavg", 64, model.head_dim, model.head_dim, model.heads, model.kv_heads)
        gates = LayerGates([gate], self.params()["gate"], f"untrained gate (random, seed {seed})")
        unset = all(getattr(self, name) is None for name in KNOBS)
        return replace(self, gate=gates, nz_ratio=0.1 if unset else self.nz_ratio)

    @property
    def note(self) -> str:
        return self.gate.note if isinstance(self.gate, LayerGates) else ""

    def params(self) -> dict[str, Any]:
        """The fields, and the hash of the gates' weights once they are loaded; `gate` stays what the user named."""
        fields = super().params()
        if isinstance(self.gate, AttnGate):
            return {**fields, "gate": "AttnGate", "gate_sha256": LayerGates([self.gate]).sha256}
        if isinstance(self.gate, LayerGates):
            return {**fields, "gate": self.gate.source, "gate_sha256": self.gate.sha256}
        return {**fields, "gate": None if self.gate is None else str(self.gate)}

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        gate = self._gate(q, k, ctx)
        block, q_len, kv_len = gate.block, q.shape[2], k.shape[2]
        if ctx.rope is None:
            raise ValueError("seer's gate puts RoPE on block positions: pass rope_theta")
        key_starts = torch.arange(0, kv_len, block, device=q.device)
        gate_q, gate_k = gate.project(
            ctx.q_pre, ctx.k_pre, *ctx.rope(key_starts, gate.rope_dim), *ctx.rope(ctx.positions[::block], gate.rope_dim)
        )
        visible = causal_blocks(q_len, kv_len, block, block, q.device)
        # The block of each row's first query: every query of the row sees it.
        own = torch.arange(kv_len - q_len, kv_len, block, device=q.device) // block
        own = own[:, None] == torch.arange(visible.shape[1], device=q.device)
        group = q.shape[1] // k.shape[1] if self.share_gqa else 1
        heads = max(1, SCRATCH_BYTES // (4 * q.shape[0] * visible.numel() * group)) * group
        parts = [
            self._choose(gate.logits(gate_q[:, h : h + heads], gate_k[:, h : h + heads]), visible, own, group)
            for h in range(0, q.shape[1], heads)
        ]
        chosen = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if chosen.dtype != torch.bool and (kv_len - q_len) % block == 0:
            return self._compact(chosen, visible, q_len, kv_len, block)
        if chosen.dtype != torch.bool:
            shape = (*chosen.shape[:-1], visible.shape[1] + 1)
            chosen = torch.zeros(shape, dtype=torch.bool, device=q.device).scatter_(-1, chosen.long(), True)[..., :-1]
        chosen[..., self._first_dense(visible) :, :] = True
        # Blocks after the own one, visible to a row's later queries only, do not count as seen by its first.
        reaches_first = own.flip(-1).cumsum(-1).flip(-1) > 0
        blind = ~(chosen & reaches_first).any(-1, keepdim=True)
        return BlockMask.from_dense(chosen | (blind & own), q_len, kv_len, block, block, trusted=True)

    def _gate(self, q: Tensor, k: Tensor, ctx: LayerContext) -> AttnGate:
        gate = self.gate
        if isinstance(gate, AttnGate):
            return gate if gate.mask_linear_k.weight.device == q.device else copy.deepcopy(gate).to(q.device)
        if gate is None:
            raise ValueError(f"seer has no trained gate; prepare() loads the one that ships for a model, or {HOW_TO_GET}")
        if not isinstance(gate, LayerGates):  # plain tensors, nothing was prepared: read at every call
            gate = load_gates(gate, ModelSpec("the given q and k", 0, q.shape[1], k.shape[1], q.shape[3]))
        return gate.at(ctx.layer, q.device)

    def _width(self, blocks: int) -> int | None:
        """Blocks per row, None where the scores decide."""
        if self.nz_ratio is not None:
            return max(int((1 - math.sqrt(1 - self.nz_ratio)) * blocks), 1)
        return None if self.budget is None else min(int(self.budget), blocks)

    def _first_dense(self, visible: Tensor) -> int:
        return max(visible.shape[0] - self.last_dense, 0)

    def _choose(self, logits: Tensor, visible: Tensor, own: Tensor, group: int) -> Tensor:
        """Block numbers as of top_blocks [B, H, NQ, width], or bool [B, H, NQ, NK]; H is a group-th of the logits' heads."""
        scores = logits.float().masked_fill_(~visible, float("-inf"))
        width = self._width(visible.shape[1])
        if width is None or group > 1:
            scores = scores.softmax(-1)
        if group > 1:
            scores = scores.unflatten(1, (-1, group)).mean(2).masked_fill_(~visible, float("-inf"))
        if width is not None:
            if self.diagonal:
                scores.masked_fill_(own, float("inf"))
            return top_blocks(scores, width)
        if self.top_p is not None:
            best, order = scores.clamp(min=0).sort(dim=-1, descending=True)
            before = best.cumsum(-1) - best
            keep = torch.zeros_like(visible).expand(scores.shape).clone().scatter_(-1, order, before < self.top_p)
            keep |= torch.full_like(own, self.top_p >= 1)  # the running sum may reach 1 before the last block
        else:
            keep = scores > (2e-3 if self.threshold is None else self.threshold)
        return keep | own if self.diagonal else keep

    def _compact(self, index: Tensor, visible: Tensor, q_len: int, kv_len: int, block: int) -> BlockMask:
        """Rows of a constant width; no size depends on the data, so the host never waits."""
        rows, blocks = visible.shape
        seen = visible.sum(-1, dtype=torch.int32)
        num = seen.clamp(max=index.shape[-1])
        first = self._first_dense(visible)
        if first < rows:
            wide = index.new_zeros(*index.shape[:-1], blocks)
            wide[..., : index.shape[-1]] = index
            wide[..., first:, :] = torch.arange(blocks, dtype=torch.int32, device=index.device)
            index, num = wide, torch.cat((num[:first], seen[first:]))
        num = num.expand(index.shape[:-1]).contiguous()
        return BlockMask(num, index, q_len, kv_len, block, block, trusted=True)
