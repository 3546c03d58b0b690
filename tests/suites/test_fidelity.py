"""Fidelity against its definition: softmax mass and output error in fp64 over the pairs that mask.tokens() lists."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
import torch

from sparsebench.kernels import BlockMask, causal_blocks
from sparsebench.kernels.patterns import sink_and_window
from sparsebench.methods import METHODS, register
from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import Method
from sparsebench.methods.dense import Dense, dense_attention
from sparsebench.methods.minference import MInference
from sparsebench.methods.oracle import Oracle
from sparsebench.methods.random_blocks import RandomBlocks
from sparsebench.models import load
from sparsebench.models.calibrate import capture_layers
from sparsebench.suites.base import Cell
from sparsebench.suites.corpora import token_windows
from sparsebench.suites.fidelity import Fidelity

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 330  # the last block is not full


@dataclass(frozen=True)
class PerKVHead(Method):
    """One selection per KV head: its query heads must each get its density."""

    name = "per_kv_head"

    def select(self, q, k, ctx):
        blocks = causal_blocks(q.shape[2], k.shape[2], 64, 64).expand(1, k.shape[1], -1, -1).clone()
        blocks[:, 1, 2:, 0] = False
        return BlockMask.from_dense(blocks, q.shape[2], k.shape[2], 64, 64)


@dataclass(frozen=True)
class OwnOutput(Method):
    """attend() of its own that is off by a factor and reports its mask."""

    name = "own_output"

    def attend(self, q, k, v, ctx):
        ctx.mask = sink_and_window(q.shape[2], k.shape[2], 4, 50)
        return 1.25 * dense_attention(q, k, v, ctx.scale)


@dataclass(frozen=True)
class Short(Method):
    """Selects for other lengths than those it was asked about."""

    name = "short"

    def select(self, q, k, ctx):
        return sink_and_window(9, 9, 4, 50)


@dataclass(frozen=True)
class Blind(Method):
    """attend() of its own that reports rows without a key."""

    name = "blind"

    def attend(self, q, k, v, ctx):
        nothing = torch.zeros_like(causal_blocks(q.shape[2], k.shape[2], 64, 64))
        ctx.mask = BlockMask.from_dense(nothing[None, None], q.shape[2], k.shape[2], 64, 64)
        return dense_attention(q, k, v, ctx.scale)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path, letters = tmp_path_factory.mktemp("corpus") / "two.jsonl", random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=LENGTH + 9)) for _ in range(2)]
    path.write_text("\n".join(json.dumps({"id": f"doc{i}", "text": text}) for i, text in enumerate(texts)))
    return f"file:{path}"


@pytest.fixture
def scores(loaded, corpus):
    def run(method):
        cell = Cell("tiny", "", method.name, method.params(), "fidelity", corpus, LENGTH, None, 2, 0, "float32")
        suite = Fidelity()
        rows = {(score.example, score.metric): score.value for score in suite.run(loaded, cell)}
        assert suite.notes["documents"] == 2
        return rows

    return run


@pytest.fixture
def registered():
    for cls in (PerKVHead, OwnOutput, Short, Blind):
        register(cls)
    yield
    for cls in (PerKVHead, OwnOutput, Short, Blind):
        del METHODS[cls.name]


def defined(loaded, corpus, method):
    """recall, error and density per document, layer and head, from nothing but the pairs."""
    rows = {}
    for document, ids in token_windows(loaded.tokenizer, corpus, "eval", LENGTH, 2).ids:
        for q, k, ctx in capture_layers(loaded.model, ids):
            if isinstance(method, OwnOutput):
                tokens = sink_and_window(LENGTH, LENGTH, 4, 50).tokens()
            else:
                tokens = method.select(q, k, ctx).tokens()
            tokens = tokens.repeat_interleave(4 // tokens.shape[1], dim=1)[0]
            q, k, v = q[0].double(), k[0].double().repeat_interleave(2, 0), ctx.v[0].double().repeat_interleave(2, 0)
            causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
            p = (q @ k.mT * ctx.scale).masked_fill(~causal, float("-inf")).softmax(-1)
            kept = p * tokens
            recall, dense = kept.sum(-1).mean(-1), p @ v
            out = 1.25 * dense if isinstance(method, OwnOutput) else kept / kept.sum(-1, keepdim=True) @ v
            error = (out - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
            density = tokens.double().sum((-1, -2)) / causal.sum()
            for head in range(4):
                place = f"{document}/{ctx.layer}/{head}"
                rows |= {(place, "recall"): recall[head], (place, "error"): error[head], (place, "density"): density[head]}
    return rows


METHODS_UNDER_TEST = [
    RandomBlocks(density=0.3), Oracle(density=0.3), AShape(init=5, local=70), MInference(vertical=40, slash=60),
    PerKVHead(), OwnOutput(),
]  # fmt: skip


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("method", METHODS_UNDER_TEST, ids=lambda m: m.name)
def test_rows_are_the_definition(loaded, corpus, scores, method):
    expected = defined(loaded, corpus, method)
    found = scores(method)
    assert set(found) == set(expected) and len(found) == 3 * 2 * 2 * 4  # metrics, documents, layers, heads
    for place, value in expected.items():
        assert found[place] == pytest.approx(float(value), rel=1e-4, abs=1e-6), place


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("method", "fault", "function"),
    [(Short(), "mask is for 9 x 9 tokens", "select"), (Blind(), "a query row would see no key", "attend")],
    ids=["short", "blind"],
)
def test_a_wrong_mask_names_the_function_that_gave_it(scores, method, fault, function):
    with pytest.raises(ValueError, match=rf"^{method.name}: {fault}.* \({function}\(\) in test_fidelity.py, line \d+\)$"):
        scores(method)


def test_dense_loses_nothing(scores):
    found = scores(Dense())
    for (place, metric), value in found.items():
        exact = {"recall": 1.0, "error": 0.0, "density": 1.0}[metric]
        assert value == pytest.approx(exact, abs=1e-5), (place, metric)


def test_the_oracle_is_above_random_in_every_head(scores):
    oracle, floor = scores(Oracle(density=0.4)), scores(RandomBlocks(density=0.4))
    recalls = [place for place in oracle if place[1] == "recall"]
    assert all(oracle[place] >= floor[place] for place in recalls)
    assert any(oracle[place] > floor[place] + 0.01 for place in recalls)
