"""The model's own rotary embedding, as methods see it: which positions it used, and its cos and sin for any position."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import LayerContext, rotate_half


@dataclass
class ModelContext(LayerContext):
    """LayerContext inside a model. `positions` count the real tokens of a sequence from 0, as methods want them; the
    model may have rotated other ones (a left-padded batch without position_ids counts its padding), so undoing RoPE looks
    the true ones up: rotary_positions [1 or B, kv_len]."""

    rotary_positions: Tensor | None = None

    def _undo_rope(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotary_positions is not None:
            positions = self.rotary_positions.to(positions.device)[:, None, positions]
        return super()._undo_rope(x, positions)


def find_rotary(model: nn.Module) -> nn.Module | None:
    """The model's only rotary embedding module, or None when it has none or several."""
    found = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    return found[0] if len(found) == 1 else None


class ModelRope:
    """(positions [...], dim) -> cos, sin [..., dim] fp32 of a model's rotary module, with its theta, scaling and attention
    factor, rounded as the model rounds them in `dtype`. For dim != head_dim the same rule is built for that width.

    Raises: ValueError naming what the half-split convention cannot express.
    """

    def __init__(self, rotary: nn.Module | None, attention: nn.Module, head_dim: int, dtype: torch.dtype):
        self.rotary, self.attention, self.head_dim, self.dtype = rotary, attention, head_dim, dtype
        self._by_dim: dict[int, nn.Module] = {}

    def __call__(self, positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if not self._by_dim:
            self._check()
        if dim not in self._by_dim:
            rotary = self._by_dim[self.head_dim]
            config: Any = copy.deepcopy(rotary.config)
            config.head_dim = dim
            self._by_dim[dim] = type(rotary)(config).to(positions.device)
        like = torch.empty(0, dtype=self.dtype, device=positions.device)
        # forward(), not a call: the hook that watches the model's positions must not see this.
        cos, sin = self._by_dim[dim].forward(like, positions.reshape(1, -1))
        return cos.reshape(*positions.shape, dim).float(), sin.reshape(*positions.shape, dim).float()

    def _check(self) -> None:
        """Compare the model's own rotation of two rows with the half-split formula that LayerContext undoes."""
        attention = type(self.attention).__name__
        if self.rotary is None or not getattr(self.attention, "use_rope", True):
            raise ValueError(
                f"{attention} (layer {self.attention.layer_idx}) has no rotary embedding that this method could undo"
            )
        kind = getattr(self.rotary, "rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(f"RoPE type {kind!r} changes its frequencies with the length: q and k before RoPE are not defined")
        apply = getattr(sys.modules[type(self.attention).__module__], "apply_rotary_pos_emb", None)
        device = next(self.attention.parameters()).device
        x = torch.linspace(-1, 1, 2 * self.head_dim, device=device).reshape(1, 1, 2, self.head_dim)
        cos, sin = self.rotary.forward(x, torch.tensor([[1, 5]], device=device))
        if cos.shape[-1] != self.head_dim:
            raise ValueError(f"{attention} rotates {cos.shape[-1]} of {self.head_dim} channels (partial rotary embedding)")
        if apply is None or not torch.allclose(apply(x, x, cos, sin)[0], x * cos + rotate_half(x) * sin, atol=1e-5):
            raise ValueError(f"{attention} does not rotate by halves (interleaved rotary embedding)")
        self._by_dim[self.head_dim] = self.rotary
