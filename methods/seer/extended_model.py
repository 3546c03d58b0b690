"""A causal LM that trains with attention over the blocks its gates choose, as one module; RoPE stretched, density solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...kernels import BlockMask, block_sparse_attention
from ...kernels.attention_with_map import attention_with_map
from ...kernels.choose_blocks import choose_blocks
from ..base import LayerContext
from .gate import AttnGate
from .gated_model import GateLearner
from .ground_truth import block_map, resolve_teacher

ROPES = ("yarn", "linear")  # types of transformers' rope_parameters that need no more than a factor
CHUNK = 4096  # tokens whose logits exist at a time: 0.8 GB in fp32 for a vocabulary of 49k


class SparseTrainer(GateLearner):
    """Attention over the blocks that each layer's gate chooses, `width` a row and the row's own among them, while it learns
    `loss` of a block (Recipe.loss).

    masks: by layer, since clear(). A layer that gradient checkpointing runs again finds its mask, and adds no second loss.
    """

    name = "seer_extend"

    def __init__(self, gates: Sequence[AttnGate], width: int, loss: str):
        super().__init__(gates)
        self.width, self.of = width, loss

    def clear(self) -> None:
        super().clear()
        self.masks: dict[int, BlockMask] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast RoPE's fp32 tables have promoted them
        if ctx.layer not in self.masks:
            # The gate's graph lives and ends in here: the hooks of a checkpoint around this layer must not count its tensors.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same), torch.autocast(q.device.type, enabled=False):
                self._choose(q.detach(), k.detach(), v.detach(), ctx)
        ctx.mask = self.masks[ctx.layer]
        return block_sparse_attention(q, k, v, ctx.mask, scale=ctx.scale)

    def _choose(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> None:
        gate = self.gates[ctx.layer]
        block = gate.block
        with torch.no_grad():
            if resolve_teacher("auto", q.device, q.dtype, q.shape[-1], block, self.of) == "kernel":
                teacher = attention_with_map(q, k, v, block, self.of, scale=ctx.scale)[2]
            else:
                teacher = block_map(q, k, self.of, block, ctx.scale)
        projected = self.learn(ctx, teacher, drop=0.0)
        self.masks[ctx.layer] = choose_blocks(
            *projected, q.shape[2], k.shape[2], block, block, width=self.width, scale=gate.gate_dim**-0.5,
            diagonal=True,
        )  # fmt: skip


def _same(x: Tensor) -> Tensor:
    return x


class Extension(nn.Module):
    """A causal LM and, for sparse training, its gates; then it runs only with `sparse` attached to the model.

    forward(input_ids int64 [B, ctx_len]): 0-d tensors, loss = token_loss + gate_weight * gate_loss, these two, and density,
    selected / visible pairs. gate_loss is the mean over layers; a gate's gradient is that of its own layer's loss.
    """

    def __init__(
        self, model: Any, gates: Sequence[AttnGate] = (), width: int = 0, gate_weight: float = 0.1, loss: str = "mass"
    ):
        super().__init__()
        self.model, self.gates, self.gate_weight = model, nn.ModuleList(gates), gate_weight
        self.sparse = SparseTrainer(gates, width, loss) if gates else None
        self.register_state_dict_post_hook(_untie)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        if self.sparse is not None:
            self.sparse.clear()
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        tokens = token_loss(self.model.get_output_embeddings(), hidden, input_ids)
        if self.sparse is None:
            return {"loss": tokens, "token_loss": tokens.detach()}
        gates = self.sparse.loss()
        density = torch.stack([mask.density().mean() for mask in self.sparse.masks.values()]).mean()
        found = {"token_loss": tokens.detach(), "gate_loss": gates.detach(), "density": density.float()}
        return {"loss": tokens + self.gate_weight * gates} | found


def _untie(module, state: dict[str, Tensor], prefix: str, local_metadata) -> None:
    """safetensors takes no two names for one memory: a tied output embedding is saved as a copy."""
    seen = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def token_loss(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next token in nats, fp32; logits exist for CHUNK tokens at a time, in the backward too.

    head: the map to logits; hidden [B, L, C] its inputs; ids int64 [B, L].
    """
    rows, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()

    def summed(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), target, reduction="sum")

    parts = [
        checkpoint(summed, part, target, use_reentrant=False, preserve_rng_state=False)
        for part, target in zip(rows.split(CHUNK), targets.split(CHUNK))
    ]
    return torch.stack(parts).sum() / len(targets)


def stretch(model: Any, rope: str, factor: float, ctx_len: int) -> None:
    """Give `model` RoPE for `factor` times its length, in place: config (which save_pretrained writes) and rotary embedding.

    Raises: ValueError for an unknown type, a factor of at most 1, a model stretched before, or a ctx_len beyond the new length.
    """
    from ...models.rope import find_rotary

    config, rotary = model.config.get_text_config(), find_rotary(model)
    length = config.max_position_embeddings
    parameters = getattr(config, "rope_parameters", None) or {}
    if rope not in ROPES:
        raise ValueError(f"unknown --rope {rope!r}: one of {', '.join(ROPES)}")
    if not 1 < factor < float("inf"):
        raise ValueError(f"--factor must be above 1 and finite, got {factor:g}")
    if ctx_len > factor * length:
        raise ValueError(f"--ctx {ctx_len} is beyond {factor:g} x the model's {length} tokens: raise --factor or lower --ctx")
    if rotary is None or parameters.get("rope_type") != "default":
        raise ValueError(
            f"{type(model).__name__} has RoPE of type {parameters.get('rope_type')!r}: only 'default' is stretched"
        )
    before = {"original_max_position_embeddings": length} if rope == "yarn" else {}
    config.rope_parameters = {**parameters, "rope_type": rope, "factor": float(factor), **before}
    config.max_position_embeddings = int(factor * length)
    name = next(name for name, module in model.named_modules() if module is rotary)
    model.set_submodule(name, type(rotary)(config).to(model.device))


def width_of(density: float, ctx_len: int, block: int) -> int:
    """Blocks a row, the own one among them, whose selected / causally visible pairs over a sequence come nearest to `density`.

    Early rows keep what there is. Raises: ValueError for a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"--density must be above 0 and at most 1, got {density:g}")
    rows = torch.arange(-(-ctx_len // block))
    tokens = (ctx_len - rows * block).clamp(max=block)
    own = (tokens * (tokens + 1) // 2).sum()
    # What the n-th block before the own one adds: every row that has one.
    added = (tokens * block).flip(0).cumsum(0).flip(0)[1:]
    pairs = torch.cat((own[None], own + added.cumsum(0))).double()
    return int((pairs / (ctx_len * (ctx_len + 1) // 2) - density).abs().argmin()) + 1


def recompute_layers(model: Any) -> None:
    """Gradient checkpointing: the backward pass runs every layer again, so that only inputs of layers are kept."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
