"""A frozen model with the gates that learn from its attention, as one module, and gates to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attention_with_map import attention_with_map
from ..base import LayerContext, Method, ModelSpec, dense_attention
from .gate import AttnGate
from .ground_truth import block_map, gate_loss, recall
from .method import block_tables


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How gates are trained. The paper: 64k-token sequences, batch 16, 500 steps, on RedPajama, loss max, drop 0.25."""

    gate_type: str = _option("Qavg_Kmaxminavg", "pools of q and of k, each any of max, min, avg in this order")
    block: int = _option(64, "tokens of a block of queries and of keys")
    gate_dim: int = _option(128, "channels in which blocks are compared")
    loss: str = _option("mass", "what of a block the gate learns: its mass, a query's largest (row_mass), or max, the paper's")
    drop: float = _option(0.0, "share of the rows, the first, left out of the loss: 0 for gates that also serve short contexts")
    steps: int = _option(500, "optimiser steps")
    batch: int = _option(1, "sequences a step")
    lr: float = _option(1e-3, "largest learning rate")
    warmup: int = _option(20, "steps up to the largest learning rate")
    seed: int = _option(0, "of the order of the data and of the first weights")

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise ValueError(f"--drop must be at least 0 and below 1, got {self.drop:g}")


class GateLearner(Method):
    """Base of methods whose layers' gates learn during the model's forward pass; for attach(), never registered.

    Of every layer since clear(): losses 0-d, grads in the order of gate.parameters().
    """

    def __init__(self, gates: Sequence[AttnGate] | nn.ModuleList):
        self.gates = gates
        self.clear()

    def clear(self) -> None:
        """Before every forward pass of the model."""
        self.losses: list[Tensor] = []
        self.grads: list[list[Tensor]] = []

    def learn(self, ctx: LayerContext, teacher: Tensor, drop: float) -> tuple[Tensor, Tensor]:
        """Loss and gradient of one layer's gate. Returns: what AttnGate.project() gave, without a graph."""
        gate: Any = self.gates[ctx.layer]
        assert ctx.rope is not None and ctx.layer == len(self.losses)
        with torch.no_grad():
            q, k = ctx.q_pre, ctx.k_pre
            tables = block_tables(ctx.rope, gate.rope_dim, q.shape[2], k.shape[2], gate.block, q.device)
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):  # gates learn in fp32 whatever runs the model
            gate_q, gate_k = gate.project(q, k, *tables)
            loss = gate_loss(gate.logits(gate_q, gate_k), teacher, drop)
            self.grads.append(list(torch.autograd.grad(loss, list(gate.parameters()))))
        self.losses.append(loss.detach())
        return gate_q.detach(), gate_k.detach()

    def loss(self) -> Tensor:
        """Mean over layers, 0-d; backward() gives every gate the gradient of its own layer's loss."""
        weights = [weight for gate in self.gates for weight in gate.parameters()]
        grads = [grad for layer in self.grads for grad in layer]
        return _GivenGradients.apply(torch.stack(self.losses).mean(), grads, *weights)


class GateTrainer(GateLearner):
    """Dense attention in whose layers gates learn.

    teacher: "kernel" or "torch" (resolve_teacher). measure: whether to compute recalls too, [gate, oracle] of every layer.
    """

    name = "seer_distill"

    def __init__(self, gates: Sequence[AttnGate] | nn.ModuleList, recipe: Recipe, teacher: str = "torch"):
        super().__init__(gates)
        self.recipe, self.teacher, self.measure = recipe, teacher, False

    def clear(self) -> None:
        super().clear()
        self.recalls: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        gate: Any = self.gates[ctx.layer]
        if self.teacher == "kernel":
            out, _, teacher = attention_with_map(q, k, v, gate.block, self.recipe.loss, scale=ctx.scale)
        else:
            out, teacher = dense_attention(q, k, v, ctx.scale), block_map(q, k, self.recipe.loss, gate.block, ctx.scale)
        projected = self.learn(ctx, teacher, self.recipe.drop)
        if self.measure:
            self.recalls.append(torch.stack((recall(gate.logits(*projected), teacher), recall(teacher, teacher))))
        return out


class _GivenGradients(torch.autograd.Function):
    """`loss`, whose gradient for the weights is known already; autograd and what hooks into it see an ordinary graph."""

    @staticmethod
    def forward(ctx, loss: Tensor, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, *factor: Tensor):
        return None, None, *(grad * factor[0] for grad in ctx.grads)


class GatedModel(nn.Module):
    """The frozen model and its gates. Runs only with `method` attached to `base`.

    forward(input_ids int64 [1, ctx_len]): {"loss": mean over layers}; a gate's gradient is that of its own layer's loss.
    """

    def __init__(self, base: Any, gates: Sequence[AttnGate], recipe: Recipe, teacher: str):
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.gates = nn.ModuleList(gates)
        self.method = GateTrainer(self.gates, recipe, teacher)
        self._no_split_modules = getattr(base, "_no_split_modules", None)  # what FSDP wraps by itself

    def train(self, mode: bool = True) -> GatedModel:
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        self.method.clear()
        with torch.no_grad():
            self.base(input_ids=input_ids, use_cache=False)
        return {"loss": self.method.loss()}

    def trained_gates(self, state: dict[str, Tensor]) -> list[AttnGate]:
        """Copies, on the CPU, with the weights of a state_dict() of this module, which may be gathered from several GPUs."""
        copies = []
        for i, gate in enumerate(self.gates):
            copies.append(AttnGate(**gate.options()))  # type: ignore[operator]
            copies[-1].load_state_dict({name: state[f"gates.{i}.{name}"] for name in copies[-1].state_dict()})
        return copies


def new_gates(model: ModelSpec, recipe: Recipe) -> list[AttnGate]:
    """Gates to train, fp32, the same for the same seed; they start near the dot product of the means (last pooling) of q and k.

    The authors start from random weights; from here the same training keeps more attention mass.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sizes = (recipe.block, model.head_dim, recipe.gate_dim, model.heads, model.kv_heads)
        gates = [AttnGate(recipe.gate_type, *sizes) for _ in range(model.layers)]
    with torch.no_grad():
        for weight in (weight for gate in gates for weight in gate.parameters()):
            weight.mul_(0.1)
            weight[:, -model.head_dim :] += torch.eye(model.head_dim, recipe.gate_dim)
    return gates
