"""What every method gets from the base: registration, selection without a graph, clear errors."""

from dataclasses import dataclass

import pytest
import torch

import sparsebench
from sparsebench.kernels import BlockMask
from sparsebench.methods import METHODS, Method, register


@dataclass(frozen=True)
class Scores(Method):
    name = "scores"

    def score(self, q, k, ctx):
        blocks = -(-k.shape[2] // 64)
        return q.sum((-1, -2))[..., None, None].expand(-1, -1, -(-q.shape[2] // 64), blocks)


@dataclass(frozen=True)
class Needy(Scores):
    name = "needy"
    width: int


@dataclass(frozen=True)
class Nameless(Method):
    def select(self, q, k, ctx):
        raise NotImplementedError


@dataclass(frozen=True)
class Twice(Scores):
    name = "twice"

    def select(self, q, k, ctx):
        raise NotImplementedError


@dataclass(frozen=True)
class Knobless(Scores):
    name = "knobless"
    knob = "nothing"


@dataclass(frozen=True)
class Taken(Scores):
    name = "dense"


class Plain(Scores):
    name = "plain"


REFUSED = [
    (Needy, "needs a default for width"), (Nameless, "needs a name"), (Twice, r"exactly one .* \['score', 'select'\]"),
    (Knobless, "names no field: 'nothing'"), (Taken, "'dense' is registered already"), (Plain, "frozen=True"),
]  # fmt: skip


@pytest.mark.parametrize("cls, message", REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused_classes(cls, message):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register(cls)
    assert before == METHODS


def test_scores_without_a_density_say_so():
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    with pytest.raises(ValueError, match="scores has scores but no field `density`"):
        sparsebench.select(Scores(), q, k)


@pytest.mark.parametrize("name", ["oracle", "minference", "random"])
def test_selection_leaves_no_graph_and_attention_keeps_its_own(name):
    q, k, v = (torch.randn(1, heads, 200, 16, requires_grad=True) for heads in (2, 1, 1))
    seen = []

    class Watch(METHODS[name]):
        def select(self, q, k, ctx) -> BlockMask:
            seen.append(torch.is_grad_enabled())
            return super().select(q, k, ctx)

    out, _ = sparsebench.attention(Watch(), q, k, v)
    sparsebench.select(Watch(), q, k, v)
    out.sum().backward()
    assert seen == [False, False]
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))
