"""What every method gets from the base: registration, selection without a graph, clear errors."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import sparsebench
from sparsebench.kernels import BlockMask
from sparsebench.methods import METHODS, Method, register
from sparsebench.methods.base import dense_mask


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


@dataclass(frozen=True)
class Steps(Scores):
    keep: int = 4
    name = "steps"
    knob = "keep"  # and the knob_range of shares


@dataclass(frozen=True)
class TwoWords(Scores):
    name = "two words"


@dataclass(frozen=True)
class NameField(Scores):
    name: str = "field"  # type: ignore[misc]


REFUSED = [
    (Needy, "needs a default for width"), (Nameless, "needs a name"), (Twice, r"exactly one .* \['score', 'select'\]"),
    (Knobless, "names no field: 'nothing'"), (Taken, "'dense' is registered already"), (Plain, "frozen=True"),
    (Steps, r"knob_range \(0.0, 1.0\) does not hold keep=4"), (TwoWords, "one word"), (NameField, "no field"),
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


@dataclass(frozen=True)
class Wrong(Method):
    """Returns `what` gives for the scores, the mask or the output."""

    what: Callable
    density: float = 0.5
    name = "wrong"


class WrongScores(Wrong):
    def score(self, q, k, ctx):
        return self.what(torch.zeros(1, 2, 2, 2))


class WrongMask(Wrong):
    def select(self, q, k, ctx):
        return self.what(q)


class WrongOutput(Wrong):
    def attend(self, q, k, v, ctx):
        return self.what(q)


class WrongReport(Wrong):
    def attend(self, q, k, v, ctx):
        ctx.mask = self.what(q)
        return q


@pytest.mark.parametrize(
    "method, message",
    [
        (WrongScores(lambda x: None), r"score\(\) must return a tensor, got NoneType"),
        (WrongScores(lambda x: x[..., :1]), r"score\(\) must return \[B, H, 2, 2\], got \(1, 2, 2, 1\)"),
        (WrongScores(lambda x: x[0]), r"score\(\) must return \[B, H, NQ, NK\] on cpu, got \[2, 2, 2\] on cpu"),
        (WrongScores(lambda x: x.to("meta")), r"score\(\) must return \[B, H, NQ, NK\] on cpu, got \[1, 2, 2, 2\] on meta"),
        (WrongScores(lambda x: x * float("nan")), r"score\(\) returned NaN"),
        (WrongMask(lambda q: q > 0), r"select\(\) must return a BlockMask, got Tensor"),
        (WrongOutput(lambda q: q.transpose(1, 2)), r"must return \[1, 2, 100, 8\] float32, got \[1, 100, 2, 8\] float32"),
        (WrongOutput(lambda q: q.double()), r"must return \[1, 2, 100, 8\] float32, got \[1, 2, 100, 8\] float64"),
        (WrongMask(lambda q: q.mul_(2)), r"select\(\) must leave q and k as they are"),
        (WrongMask(lambda q: dense_mask(99, 99)), "mask is for 99 x 99 tokens"),
        (WrongOutput(lambda q: None), r"attend\(\) must return a tensor, got NoneType"),
        (WrongOutput(lambda q: q.mul_(2)), r"attend\(\) must leave q, k and v as they are"),
        (WrongReport(lambda q: q > 0), r"attend\(\) must put a BlockMask for 100 x 100 tokens into ctx.mask"),
        (WrongReport(lambda q: dense_mask(99, 99)), r"attend\(\) must put a BlockMask for 100 x 100 tokens into ctx.mask"),
    ],
)
def test_what_a_method_does_wrongly_is_named_with_its_place(method, message):
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    with pytest.raises(ValueError, match=message) as caught:
        sparsebench.attention(method, q, k, k)
    (function,) = {"score", "select", "attend"} & set(vars(type(method)))
    line = inspect.getsourcelines(getattr(type(method), function))[1]
    assert str(caught.value).startswith("wrong: ")
    assert str(caught.value).endswith(f" ({function}() in test_base.py, line {line})")


def test_inference_mode():
    with torch.inference_mode():
        q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
        assert sparsebench.attention(METHODS["random"](), q, k, k)[0].shape == q.shape


def test_nan_for_the_future_is_no_fault():
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    mask = sparsebench.select(WrongScores(lambda x: x.masked_fill(torch.ones(2, 2).triu(1) > 0, float("nan"))), q, k)
    assert mask.dense().shape == (1, 2, 2, 2)


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
