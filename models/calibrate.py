"""Turn a method's knob until it has a wanted density on calibration text."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..methods.base import LayerContext, Method, attended, dense_attention, selected
from .attach import attach

STEPS = 16
TOLERANCE = 0.01  # relative

Layer = tuple[Tensor, Tensor, LayerContext]


@dataclasses.dataclass(frozen=True)
class _Probe(Method):
    look: Callable[[Tensor, Tensor, LayerContext], None]
    name = "probe"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        self.look(q, k, ctx)
        return dense_attention(q, k, v, ctx.scale)


@torch.no_grad()
def visit(model: Any, documents: Iterable[list[int]], look: Callable[[Tensor, Tensor, LayerContext], None]) -> None:
    """Runs the model dense over the documents (token ids), with look(q, k, ctx) at every layer of each."""
    with attach(model, _Probe(look)):
        for ids in documents:
            model.base_model(torch.tensor([ids], device=model.device), use_cache=False)


def capture_layers(model: Any, ids: list[int]) -> list[Layer]:
    """q [1, H, L, D], k [1, H_kv, L, D] and context of every layer of the dense model on one sequence."""
    layers: list[Layer] = []
    visit(model, [ids], lambda *layer: layers.append(layer))
    return layers


def calibrate(
    method: Method,
    target: float,
    layers: list[Layer],
    ready: Callable[[Method], Method],
) -> tuple[Method, float]:
    """`method` with its knob turned to the density `target` (mean over heads and layers) on the captured layers, and the
    density it has there.

    `ready` makes a candidate runnable (Method.prepare for the model, or Method.synthetic).

    Bisection within knob_range to 1 % of the target, or as near as the knob's range and steps allow.
    Raises: ValueError when the method has no knob, or knob_range names its densest value first.
    """
    knob = method.knob
    if knob is None:
        raise ValueError(f"{method.name} has no knob: its density is fixed by its definition")
    low, high = sparsest, densest = method.knob_range
    hint = typing.get_type_hints(type(method))[knob]  # not the value: 1.0 comes back from a stored cell as 1
    whole = float not in (typing.get_args(hint) or (hint,))
    log = method.knob_log
    tried: dict[float, tuple[Method, float]] = {}

    def density_at(value: float) -> float:
        value = round(value) if whole else value
        if value not in tried:
            candidate = ready(dataclasses.replace(method, **{knob: value}))  # type: ignore[type-var]
            tried[value] = candidate, sum(_density(candidate, *layer) for layer in layers) / len(layers)
        return tried[value][1]

    for _ in range(STEPS):
        middle = math.sqrt(low * high) if log else (low + high) / 2
        density = density_at(middle)
        if abs(density - target) <= TOLERANCE * target:
            break
        if density < target:
            low = middle
        else:
            high = middle
    else:  # an end of the range is nearer than anything inside it when the density jumps there
        ends = density_at(sparsest), density_at(densest)
        if ends[0] > 1.1 * ends[1]:
            raise ValueError(
                f"{method.name}.knob_range is (sparsest, densest value), but {knob}={sparsest:g} keeps {ends[0]:.3g} of the "
                f"pairs and {knob}={densest:g} keeps {ends[1]:.3g}"
            )
    return min(tried.values(), key=lambda found: abs(found[1] - target))


def _density(method: Method, q: Tensor, k: Tensor, ctx: LayerContext) -> float:
    ctx.state.clear()
    if type(method).attend is Method.attend:
        return float(selected(method, q, k, ctx).density().mean())
    ctx.mask = None
    attended(method, q, k, ctx.v, ctx)
    return 1.0 if ctx.mask is None else float(ctx.mask.density().mean())


def calibration_facts(method: Method, target: float, reached: float, text: str) -> dict[str, str]:
    """What a result row keeps of a calibrated method: the knob ("local=312"), on which text, and a note when it fell short."""
    assert method.knob is not None
    nearest = f"the nearest that its knob gets to density {target:g} is {reached:.3g}"
    return {
        "knob": f"{method.knob}={getattr(method, method.knob):.6g}",
        "calibrated_on": text,
        "note": "" if abs(reached - target) <= TOLERANCE * target else nearest,
    }
