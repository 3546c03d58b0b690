"""What a sparse attention method is, what it is given, and how to run one on plain tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import BlockMask, block_sparse_attention, causal_blocks
from ..kernels.selection import keep_top

METHODS: dict[str, type[Method]] = {}

Rope = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelSpec:
    """What a method may know of the model it is prepared for."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class LayerContext:
    """Everything a method may read besides q and k, for one layer and one forward pass."""

    layer: int
    phase: str  # "prefill" (also chunked: 1 < q_len < kv_len) or "decode"
    scale: float  # logits factor
    v: Tensor  # [B, H_kv, kv_len, D]
    positions: Tensor  # [q_len] absolute positions of q's rows
    state: dict[str, Any] = field(default_factory=dict)  # this layer's scratch, cleared at every prefill
    rope: Rope | None = None  # (positions [n], dim) -> cos, sin [n, dim], half-split, with the model's own theta and scaling
    num_layers: int = 1
    mask: BlockMask | None = None  # what ran; methods that override attend() report theirs here, None means dense
    q: Tensor | None = field(default=None, repr=False)
    k: Tensor | None = field(default=None, repr=False)
    _q_pre: Tensor | None = field(default=None, repr=False)
    _k_pre: Tensor | None = field(default=None, repr=False)

    @property
    def q_pre(self) -> Tensor:
        """[B, H, q_len, D] before RoPE (after q_norm where the model has one); computed on first use."""
        if self._q_pre is None:
            assert self.q is not None
            self._q_pre = self._undo_rope(self.q, self.positions)
        return self._q_pre

    @property
    def k_pre(self) -> Tensor:
        """[B, H_kv, kv_len, D] before RoPE (after k_norm where the model has one); computed on first use."""
        if self._k_pre is None:
            assert self.k is not None
            self._k_pre = self._undo_rope(self.k, torch.arange(self.k.shape[2], device=self.k.device))
        return self._k_pre

    def _undo_rope(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rope is None:
            raise ValueError("this method reads q and k before RoPE: pass q_pre and k_pre, or rope_theta")
        cos, sin = self.rope(positions, x.shape[-1])
        x32 = x.float()
        # cos and sin may carry YaRN's attention factor f; rotating back by (cos, -sin) leaves f^2.
        return ((x32 * cos - rotate_half(x32) * sin) / (cos * cos + sin * sin)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) over the halves of the last dimension (RoPE's half-split convention)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def plain_rope(theta: float) -> Rope:
    """RoPE tables without scaling (Su et al. 2021, arXiv 2104.09864), fp32."""

    def tables(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        channel = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
        angle = positions.float()[:, None] * (1.0 / theta ** (channel / dim))
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    return tables


class Method:
    """Base of all methods. A subclass is a frozen dataclass whose fields are the hyper-parameters (the paper's defaults)
    and overrides exactly one of score, select, attend. Instances are immutable; scratch lives in ctx.state."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""  # authors, year and arXiv id
    cost: ClassVar[str] = ""  # of the selection, per head: L tokens, D channels, N = L / block
    phases: ClassVar[frozenset[str]] = frozenset({"prefill"})
    knob: ClassVar[str | None] = None  # the field that moves density
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)  # sparsest and densest value, in this order
    knob_log: ClassVar[bool] = False  # whether the values in between lie on a log scale
    # "nothing"; "search": per-head settings can be searched for a model, the fields stand in without; "training": select()
    # fails without a trained part
    needs: ClassVar[str] = "nothing"

    def score(self, q: Tensor, k: Tensor, ctx: LayerContext) -> Tensor:
        """Importance of key blocks, [B, H, NQ, NK]. The best ones of every row are kept up to the fields `density` and
        `block` (tokens, 64 when absent) of the method."""
        raise NotImplementedError

    def select(self, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
        """The blocks to attend to. q [B, H, q_len, D], k [B, H_kv, kv_len, D], after RoPE."""
        block, density = getattr(self, "block", 64), getattr(self, "density", None)
        if density is None:
            raise ValueError(f"{self.name} has scores but no field `density` to say how many of them are kept")
        scores = self.score(q, k, ctx)
        with blamed(self):
            if not isinstance(scores, Tensor):
                raise ValueError(f"score() must return a tensor, got {type(scores).__name__}")
            if scores.ndim != 4 or scores.device != q.device:
                got = f"{list(scores.shape)} on {scores.device}"
                raise ValueError(f"score() must return [B, H, NQ, NK] on {q.device}, got {got}")
            mask = keep_top(scores, q.shape[2], k.shape[2], block, block, density)
            if (scores.isnan() & causal_blocks(q.shape[2], k.shape[2], block, block, q.device)).any():
                raise ValueError("score() returned NaN for blocks that its rows see")
        return mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        """The attention output [B, H, q_len, D]."""
        with torch.no_grad():  # a choice of blocks has no gradient, and its graph may hold the whole attention map
            ctx.mask = selected(self, q, k, ctx)
        with blamed(self):
            return block_sparse_attention(q, k, v, ctx.mask, scale=ctx.scale)

    def prepare(self, model: ModelSpec) -> Method:
        """This method with what it needs for `model` loaded (a trained gate, a per-head file); the default needs nothing.

        Raises: ValueError with what is missing and how to get it.
        """
        return self

    def files(self, model_name: str) -> list[Path]:
        """Files and folders that prepare() reads for a model: their content is part of a result's identity."""
        return []

    def synthetic(self, model: ModelSpec, seed: int) -> Method:
        """The method as the speed suite runs it on random tensors, where nothing can be trained or searched."""
        return self

    @property
    def note(self) -> str:
        """What a reader of the result row must know, e.g. an untrained gate; empty by default."""
        return ""

    def params(self) -> dict[str, Any]:
        """Hyper-parameters as JSON values: part of a result's identity."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its name.

    Raises: ValueError for a name that is missing, taken or no word, a class that is no frozen dataclass, a field without
        default, a knob_range that does not hold its knob's default, or a class that overrides none or several of score, select
        and attend.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen or "__dataclass_fields__" not in vars(cls):
        raise ValueError(f"{cls.__name__} must be a @dataclass(frozen=True) below @register")
    overridden = _overridden(cls)
    if len(overridden) != 1:
        raise ValueError(f"{cls.__name__} must override exactly one of score, select, attend; it overrides {overridden}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    bare = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if bare:
        raise ValueError(f"{cls.__name__} needs a default for {', '.join(bare)}")
    if cls.knob is not None and cls.knob not in fields:
        raise ValueError(f"{cls.__name__}.knob names no field: {cls.knob!r}")
    default = getattr(cls, cls.knob, None) if cls.knob is not None else None
    if default is not None and not min(cls.knob_range) <= default <= max(cls.knob_range):
        raise ValueError(
            f"{cls.__name__}.knob_range {cls.knob_range} does not hold {cls.knob}={default}: give sparsest and densest value"
        )
    if not isinstance(getattr(cls, "name", None), str) or not re.fullmatch(r"\w[\w.-]*", cls.name) or "name" in fields:
        raise ValueError(f"{cls.__name__} needs a name, one word and no field: what --methods calls it")
    if cls.name in METHODS:
        raise ValueError(f"a method named {cls.name!r} is registered already")
    METHODS[cls.name] = cls
    return cls


def _overridden(cls: type[Method]) -> list[str]:
    return [f for f in ("score", "select", "attend") if getattr(cls, f) is not getattr(Method, f)]


def check_fields(method: Method, **bounds: tuple[float, float]) -> None:
    """Raise ValueError naming the first field outside its closed interval; None values pass."""
    for name, (low, high) in bounds.items():
        value = getattr(method, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{method.name}:{name}={value} is out of range [{low:.10g}, {high:.10g}]")


def selected(method: Method, q: Tensor, k: Tensor, ctx: LayerContext) -> BlockMask:
    """method.select(q, k, ctx). Raises: ValueError when that is no BlockMask, or changes q or k."""
    written = _written(q, k)
    mask = method.select(q, k, ctx)
    with blamed(method):
        if _written(q, k) != written:
            raise ValueError("select() must leave q and k as they are, it changed one of them in place")
        if not isinstance(mask, BlockMask):
            raise ValueError(f"select() must return a BlockMask, got {type(mask).__name__}")
    return mask


def attended(method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
    """method.attend(q, k, v, ctx). Raises: ValueError when that is no tensor of q's shape and dtype, changes q, k or v, or puts
    into ctx.mask what is no BlockMask for them."""
    written = _written(q, k, v)
    out = method.attend(q, k, v, ctx)
    with blamed(method):
        if _written(q, k, v) != written:
            raise ValueError("attend() must leave q, k and v as they are, it changed one of them in place")
        if not isinstance(out, Tensor):
            raise ValueError(f"attend() must return a tensor, got {type(out).__name__}")
        # Autocast computes in a dtype of its own.
        if out.shape != q.shape or (out.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type)):
            wanted, got = (f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in (q, out))
            raise ValueError(f"attend() must return {wanted}, got {got}")
        mask, lengths = ctx.mask, (q.shape[2], k.shape[2])
        if mask is not None and (not isinstance(mask, BlockMask) or (mask.q_len, mask.kv_len) != lengths):
            raise ValueError(f"attend() must put a BlockMask for {lengths[0]} x {lengths[1]} tokens into ctx.mask")
    return out


@contextlib.contextmanager
def blamed(method: Method) -> Iterator[None]:
    """A ValueError about what `method` returned also names it and where the function begins that returned it."""
    try:
        yield
    except ValueError as error:
        function = next(iter(_overridden(type(method))), "select")
        code = getattr(inspect.unwrap(getattr(type(method), function)), "__code__", None)
        place = f" ({function}() in {Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
        raise ValueError(f"{method.name}: {error}{place}") from error


def _written(*tensors: Tensor) -> list[int]:
    """How often torch has written into each; unknown for tensors of torch.inference_mode()."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _context(q, k, v, q_pre, k_pre, rope_theta, layer) -> LayerContext:
    q_len, kv_len = q.shape[2], k.shape[2]
    return LayerContext(
        layer=layer, phase="decode" if q_len == 1 < kv_len else "prefill", scale=q.shape[-1] ** -0.5, v=v,
        positions=torch.arange(kv_len - q_len, kv_len, device=q.device), rope=rope_theta and plain_rope(rope_theta),
        q=q, k=k, _q_pre=q_pre, _k_pre=k_pre,
    )  # fmt: skip


def select(
    method: Method, q: Tensor, k: Tensor, v: Tensor | None = None, *, q_pre: Tensor | None = None,
    k_pre: Tensor | None = None, rope_theta: float | None = None, layer: int = 0,
) -> BlockMask:  # fmt: skip
    """What `method` would attend to, outside any model.

    Args:
        q [B, H, q_len, D], k, v [B, H_kv, kv_len, D] after RoPE; q_pre, k_pre the same before RoPE, else undone from q and k
        with rope_theta; layer is what methods with per-layer settings look at.

    Returns: BlockMask. Raises: ValueError when the method needs what was not given.
    """
    if type(method).attend is not Method.attend:
        return attention(method, q, k, k if v is None else v, q_pre=q_pre, k_pre=k_pre, rope_theta=rope_theta, layer=layer)[1]
    with torch.no_grad():
        return selected(method, q, k, _context(q, k, v, q_pre, k_pre, rope_theta, layer))


def attention(
    method: Method, q: Tensor, k: Tensor, v: Tensor, *, q_pre: Tensor | None = None, k_pre: Tensor | None = None,
    rope_theta: float | None = None, layer: int = 0,
) -> tuple[Tensor, BlockMask]:  # fmt: skip
    """The attention output [B, H, q_len, D] of `method` outside any model, and the BlockMask that ran; see select()."""
    ctx = _context(q, k, v, q_pre, k_pre, rope_theta, layer)
    out = attended(method, q, k, v, ctx)
    return out, ctx.mask if ctx.mask is not None else dense_mask(q.shape[2], k.shape[2], q.device)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
    """Causal attention, q's last row at k's last row. q [B, H, q_len, D], k, v [B, H_kv, kv_len, D] -> [B, H, q_len, D].

    real: bool [B, kv_len], keys that are no padding; for one query per row only.
    """
    (batch, heads, q_len, dim), (_, kv_heads, kv_len, _) = q.shape, k.shape
    if q_len == 1:  # the heads of a GQA group become the queries of one head: k and v are read once and never repeated
        grouped = q.view(batch, kv_heads, -1, dim)
        mask = None if real is None else real[:, None, None, :]
        out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape)
    mask = None
    if q_len < kv_len:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=q_len == kv_len, scale=scale, enable_gqa=heads != kv_heads
    )


def dense_mask(q_len: int, kv_len: int, device=None, block: int = 64) -> BlockMask:
    """The BlockMask of all causal blocks of `block` tokens, [1, 1, NQ, NK]."""
    visible = causal_blocks(q_len, kv_len, block, block, device)[None, None]
    num = visible.sum(-1, dtype=torch.int32)
    index = torch.arange(visible.shape[-1], dtype=torch.int32, device=device).expand(visible.shape).contiguous()
    return BlockMask(num, index, q_len, kv_len, block, block, trusted=True)
