"""SeerAttention (Gao et al. 2024, arXiv 2410.13276; microsoft/SeerAttention aba03e3), prefill."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...kernels import BlockMask, causal_blocks
from ...kernels.block_lists import visible_pairs
from ...kernels.choose_blocks import choose_blocks, complete_rows, own_blocks
from ..base import LayerContext, Method, ModelSpec, Rope, check_fields, register
from .gate import AttnGate
from .weights import LayerGates, find_files, load_gates, shipped_gate

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
    last_dense: query blocks at the end that attend to everything (in chunked prefill: at the end of each chunk). Two of 64
        tokens are 23 % of all pairs at 1k tokens and 3 % at 8k: 0 compares with other methods on equal terms.
    share_gqa: one selection per KV head, S from the mean of its query heads' logits.
    diagonal: always keep a row's own block (counted in nz_ratio, budget and min_blocks).
    min_blocks: with threshold, a row keeps its best `min_blocks` in any case. Rows whose attention is spread thin have no block
        above a high threshold.

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
    min_blocks: int = 0  # per row

    def __post_init__(self):
        chosen = [name for name in KNOBS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"seer takes one of {', '.join(KNOBS)}; got {' and '.join(chosen)}")
        most = float("inf")
        check_fields(
            self, threshold=(-1, 1), nz_ratio=(0, 1), budget=(1, most), top_p=(0, 1), last_dense=(0, most), min_blocks=(0, most)
        )
        if isinstance(self.gate, (str, Path)):
            find_files(Path(self.gate).expanduser())
        knob = chosen[0] if chosen else "threshold"
        if self.min_blocks and knob != "threshold":
            raise ValueError(f"seer:min_blocks goes with threshold, got {knob}")
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
        if not isinstance(self.gate, LayerGates):
            return ""
        dense = self.last_dense * self.gate.at(0, torch.device("cpu")).block
        of_1k, of_8k = (100 * visible_pairs(min(dense, n), n) / visible_pairs(n, n) for n in (1024, 8192))
        budget = (
            f"its dense last {dense} queries are {of_1k:.0f} % of all pairs at 1k tokens and {of_8k:.0f} % at 8k, and count in "
            "its density: seer:last_dense=0 compares on equal terms"
        )
        return "; ".join(filter(None, (self.gate.note, budget if dense else "")))

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
        tables = block_tables(ctx.rope, gate.rope_dim, q_len, kv_len, block, q.device)
        halves = self.top_p is None and not self.share_gqa
        gate_q, gate_k = gate.project(ctx.q_pre, ctx.k_pre, *tables, halves=halves)
        if self.share_gqa:
            gate_q, gate_k = mean_of_group(gate_q, gate_k, k.shape[1])
        if self.top_p is None:
            return choose_blocks(
                gate_q, gate_k, q_len, kv_len, block, block, width=self._width(-(-kv_len // block)), threshold=self._cut,
                least=int(self.min_blocks), scale=gate.gate_dim**-0.5, last_dense=int(min(self.last_dense, q_len)),
                diagonal=self.diagonal,
            )  # fmt: skip
        heads = gate_q.shape[1]
        gate_k = gate_k.repeat_interleave(heads // gate_k.shape[1], dim=1)
        visible = causal_blocks(q_len, kv_len, block, block, q.device)
        own = own_blocks(q_len, kv_len, block, block, q.device)
        step = max(1, SCRATCH_BYTES // (4 * q.shape[0] * visible.numel()))
        parts = [
            self._most_likely(gate.logits(gate_q[:, h : h + step], gate_k[:, h : h + step]), visible, own)
            for h in range(0, heads, step)
        ]
        chosen = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        chosen = complete_rows(chosen, own, self.last_dense)
        return BlockMask.from_dense(chosen, q_len, kv_len, block, block, trusted=True)

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

    @property
    def _cut(self) -> float:
        return 2e-3 if self.threshold is None else self.threshold

    def _most_likely(self, logits: Tensor, visible: Tensor, own: Tensor) -> Tensor:
        """bool [B, H, NQ, NK]: the fewest best blocks of every row whose softmax sums to top_p."""
        assert self.top_p is not None
        scores = logits.float().masked_fill_(~visible, float("-inf")).softmax(-1)
        best, order = scores.sort(dim=-1, descending=True)
        before = best.cumsum(-1) - best
        keep = torch.zeros_like(visible).expand(scores.shape).clone().scatter_(-1, order, before < self.top_p)
        keep |= torch.full_like(own, self.top_p >= 1)  # the running sum may reach 1 before the last block
        return keep | own if self.diagonal else keep


def mean_of_group(q: Tensor, k: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """q, k [B, H_kv, N, C], whose dot products are the means over a group's query heads of those of the arguments.

    q [B, H, NQ, G], k [B, H or H_kv, NK, G]: AttnGate.project()'s output. C is G, or all of a group's channels where every
    query head has a k of its own.
    """
    q = q.unflatten(1, (kv_heads, -1))
    if k.shape[1] == kv_heads:
        return q.mean(2), k
    own = k.unflatten(1, (kv_heads, -1))
    return q.transpose(2, 3).flatten(3) / q.shape[2], own.transpose(2, 3).flatten(3)


_TABLES: WeakKeyDictionary[Rope, tuple[tuple, tuple[Tensor, ...]]] = WeakKeyDictionary()


def block_tables(rope: Rope, dim: int, q_len: int, kv_len: int, block: int, device: torch.device) -> tuple[Tensor, ...]:
    """RoPE's cos and sin [NK, dim] at the first positions of key blocks, then [NQ, dim] at those of query blocks.

    They depend on positions alone, so every `rope` keeps those of its last lengths: a table takes a dozen small launches.
    """
    key = (dim, q_len, kv_len, block, device)
    kept = _TABLES.get(rope)
    if kept is not None and kept[0] == key:
        return kept[1]
    cos, sin = rope(torch.arange(0, kv_len, block, device=device), dim)
    offset = kv_len - q_len
    if offset % block:
        cos_q, sin_q = rope(torch.arange(offset, kv_len, block, device=device), dim)
    else:
        cos_q, sin_q = cos[offset // block :], sin[offset // block :]
    _TABLES[rope] = key, (cos, sin, cos_q, sin_q)
    return cos, sin, cos_q, sin_q
