"""What the speed suite measures on: random tensors or a model's own q, k and v from a file, and masks without a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels import BlockMask
from ..kernels.block_mass import block_mass
from ..kernels.selection import keep_top
from ..methods.base import LayerContext, Method, ModelSpec, Rope, plain_rope
from ..methods.random_blocks import random_mask
from .base import NotApplicable

SHAPE = ModelSpec("llama-3.1-8b-shape", layers=1, heads=32, kv_heads=8, head_dim=128)
ROPE_THETA = 500_000.0
FORMAT = "sparsebench-qkv-1"
FACTS = {"model": str, "revision": str, "corpus": str, "document": str, "tokens": int, "layer": int, "layers": int}
FACTS |= {"heads": int, "kv_heads": int, "head_dim": int, "scale": float}
HOW_TO_GET = "python -m sparsebench.suites.capture writes such files"


def save_layer(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write one layer of a model run: q, k, v [1, H or H_kv, L, D] after RoPE, cos, sin [L, D] and FACTS about them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": FORMAT} | {name: str(facts[name]) for name in FACTS}
    save_file({name: x.contiguous().cpu() for name, x in tensors.items()}, path, metadata)


def saved_facts(path: str) -> dict[str, Any]:
    """FACTS of a file of save_layer(). Raises: ValueError when it is missing or something else."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"--qkv {path}: no such file; {HOW_TO_GET}")
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError("another format")
        return {name: kind(metadata[name]) for name, kind in FACTS.items()}
    except (SafetensorError, ValueError, KeyError):
        raise ValueError(f"--qkv {path} holds no layer's q, k and v; {HOW_TO_GET}") from None


@dataclass(frozen=True)
class Source:
    """Where q, k and v come from: independent normal numbers in the shape SHAPE, or the first ctx_len tokens of a file."""

    ctx_len: int  # tokens
    seed: int
    dtype: str
    device: str = "cuda"
    path: str = ""  # of save_layer()'s file

    @property
    def spec(self) -> ModelSpec:
        if not self.path:
            return SHAPE
        facts = saved_facts(self.path)
        return ModelSpec(facts["model"], *(facts[name] for name in ("layers", "heads", "kv_heads", "head_dim")))

    @property
    def example(self) -> str:
        """How a row names it."""
        return f"{self.spec.name} layer {saved_facts(self.path)['layer']}" if self.path else SHAPE.name

    def load(self) -> LayerContext:
        """A layer's context with q [1, H, L, D], k and v [1, H_kv, L, D]. Raises: NotApplicable when the file is too short."""
        return self._saved() if self.path else self._random()

    def _random(self) -> LayerContext:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(heads: int) -> Tensor:
            shape = (1, heads, self.ctx_len, SHAPE.head_dim)
            return torch.randn(shape, device=self.device, dtype=getattr(torch, self.dtype), generator=generator)

        q, k, v = draw(SHAPE.heads), draw(SHAPE.kv_heads), draw(SHAPE.kv_heads)
        # Such numbers stay what they are under RoPE: q and k serve as their own pre-RoPE tensors, which a model has for free.
        return LayerContext(
            0, "prefill", SHAPE.head_dim**-0.5, v, torch.arange(self.ctx_len, device=self.device),
            rope=plain_rope(ROPE_THETA), q=q, k=k, _q_pre=q, _k_pre=k,
        )  # fmt: skip

    def _saved(self) -> LayerContext:
        facts = saved_facts(self.path)
        if self.ctx_len > facts["tokens"]:
            raise NotApplicable(f"{self.path} holds {facts['tokens']} tokens")
        with safe_open(Path(self.path).expanduser(), framework="pt", device=self.device) as file:
            q, k, v = (file.get_slice(name)[:, :, : self.ctx_len].to(getattr(torch, self.dtype)) for name in "qkv")
            cos, sin = (file.get_slice(name)[: self.ctx_len] for name in ("cos", "sin"))
        ctx = LayerContext(
            facts["layer"], "prefill", facts["scale"], v.contiguous(), torch.arange(self.ctx_len, device=self.device),
            rope=_tables(cos, sin), num_layers=facts["layers"], q=q.contiguous(), k=k.contiguous(),
        )  # fmt: skip
        ctx.q_pre, ctx.k_pre  # noqa: B018  computed here, since a model has them for free
        return ctx


def _tables(cos: Tensor, sin: Tensor) -> Rope:
    def rope(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if dim != cos.shape[-1]:
            raise ValueError(f"the file of q and k has RoPE tables of {cos.shape[-1]} channels, this method asks for {dim}")
        return cos[positions], sin[positions]

    return rope


@dataclass(frozen=True)
class RandomMask(Method):
    """Blocks drawn at random for a kernel that is measured without a method; every row takes those on its diagonal first."""

    name = "random_mask"
    knob: ClassVar[str] = "density"
    density: float = 0.1  # share of the causally visible pairs

    @staticmethod
    def make(source: Source, blocks: tuple[int, int], density: float, heads: int) -> BlockMask:
        """The mask [1, heads, NQ, NK] of query and key blocks of that many tokens; heads: SHAPE.heads or, when the query heads
        of a KV head share a selection, SHAPE.kv_heads."""
        length, (q_block, kv_block) = source.ctx_len, blocks
        head = torch.arange(heads, device=source.device)
        return random_mask(head, length, length, q_block, kv_block, density, source.seed)


@dataclass(frozen=True)
class RealMask(Method):
    """The blocks that hold the most attention of a model's layer (see `oracle`), for a kernel that is measured without a
    method. The layer's heads are repeated group by group until there are as many as SHAPE has."""

    name = "real_mask"
    knob: ClassVar[str] = "density"
    density: float = 0.1  # share of the causally visible pairs

    @staticmethod
    def make(source: Source, blocks: tuple[int, int], density: float, heads: int) -> BlockMask:
        """As RandomMask.make(); a shared selection is by what all query heads of the KV head hold together."""
        ctx = source.load()
        assert ctx.q is not None and ctx.k is not None
        mass = block_mass(ctx.q, ctx.k, ctx.scale, *blocks)
        wanted, given = heads // SHAPE.kv_heads, source.spec.heads // source.spec.kv_heads
        if heads == SHAPE.kv_heads:
            mass, given = mass.unflatten(1, (-1, given)).sum(2), 1
        mask = keep_top(mass, source.ctx_len, source.ctx_len, *blocks, density, across_rows=True)
        head = torch.arange(heads, device=source.device)
        head = head // wanted % source.spec.kv_heads * given + head % wanted % given
        longest = int(mask.kv_num_blocks.max())  # no wider lists than a random mask's: kernels are chosen by their width
        num, index = mask.kv_num_blocks[:, head], mask.kv_indices[:, head, :, :longest]
        return BlockMask(num, index, source.ctx_len, source.ctx_len, *blocks, trusted=True)
