"""Turn a method's knob until it has a wanted density on calibration text."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods.base import LayerContext, Method, dense_attention
from .attach import attach

STEPS = 16


@dataclasses.dataclass(frozen=True)
class _Capture(Method):
    """Runs the model dense and keeps every layer's q, k and context."""

    layers: list[tuple[Tensor, Tensor, LayerContext]]
    name = "capture"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        self.layers.append((q, k, ctx))
        return dense_attention(q, k, v, ctx.scale)


@torch.no_grad()
def capture_layers(model: Any, ids: list[int]) -> list[tuple[Tensor, Tensor, LayerContext]]:
    """q [1, H, L, D], k [1, H_kv, L, D] and context of every layer of the dense model on one sequence."""
    layers: list[tuple[Tensor, Tensor, LayerContext]] = []
    with attach(model, _Capture(layers)):
        model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
    return layers


def calibrate(
    method: Method,
    target: float,
    layers: list[tuple[Tensor, Tensor, LayerContext]],
    ready: Callable[[Method], Method],
    tolerance: float = 0.01,
) -> tuple[Method, float]:
    """`method` with its knob turned to the density `target` (mean over heads and layers) on the captured layers, and the
    density it has there.

    `ready` makes a candidate runnable (Method.prepare for the model, or Method.synthetic).

    Bisection within knob_range to a relative `tolerance`, or as near as the knob's range and steps allow.
    Raises: ValueError when the method has no knob.
    """
    knob = method.knob
    if knob is None:
        raise ValueError(f"{method.name} has no knob: its density is fixed by its definition")
    low, high = method.knob_range
    hint = typing.get_type_hints(type(method))[knob]  # not the value: 1.0 comes back from a stored cell as 1
    whole = float not in (typing.get_args(hint) or (hint,))
    log = method.knob_log
    tried: dict[float, tuple[Method, float]] = {}
    for _ in range(STEPS):
        middle = math.sqrt(max(low, 1e-9) * max(high, 1e-9)) if log else (low + high) / 2
        value = round(middle) if whole else middle
        if value not in tried:
            candidate = ready(dataclasses.replace(method, **{knob: value}))  # type: ignore[type-var]
            tried[value] = candidate, sum(_density(candidate, *layer) for layer in layers) / len(layers)
        density = tried[value][1]
        if abs(density - target) <= tolerance * target:
            break
        if density < target:
            low = middle
        else:
            high = middle
    return min(tried.values(), key=lambda found: abs(found[1] - target))


def _density(method: Method, q: Tensor, k: Tensor, ctx: LayerContext) -> float:
    ctx.state.clear()
    if type(method).attend is Method.attend:
        return float(method.select(q, k, ctx).density().mean())
    ctx.mask = None
    method.attend(q, k, ctx.v, ctx)
    return 1.0 if ctx.mask is None else float(ctx.mask.density().mean())


def knob_setting(method: Method) -> str:
    """The calibrated knob as a result row keeps it: "local=312"."""
    assert method.knob is not None
    return f"{method.knob}={getattr(method, method.knob):.6g}"
