"""The speed suite: its check of the output on any machine, its times on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparsebench.kernels import BlockMask
from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import LayerContext, select
from sparsebench.methods.minference import MInference
from sparsebench.methods.random_blocks import RandomBlocks
from sparsebench.suites import speed
from sparsebench.suites.base import Cell
from sparsebench.suites.speed import MOST_ERROR, SHAPE, Speed, sampled_error

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 0.25


def tensors(q_len, kv_len):
    return torch.randn(1, 4, q_len, 16), torch.randn(1, 2, kv_len, 16), torch.randn(1, 2, kv_len, 16)


def exact(q, k, v, mask):
    """The definition in fp64 from the pairs of mask.tokens()."""
    tokens = mask.tokens().repeat_interleave(q.shape[1] // mask.kv_num_blocks.shape[1], dim=1)
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    return (q.double() @ k.mT * SCALE).masked_fill(~tokens, float("-inf")).softmax(-1) @ v


def columns_in_the_future(q_len, kv_len):
    """A single column of every row that only the last row can see."""
    rows = -(-q_len // 64)
    first = torch.zeros(1, 1, rows, 1, dtype=torch.int32)
    ones, column = torch.ones(1, 1, rows, dtype=torch.int32), torch.full_like(first, kv_len - 3)
    return BlockMask(ones, first, q_len, kv_len, 64, 64, column, ones).check()


def tri_shape(q_len, kv_len):
    mask = select(RandomBlocks(density=1.0), *tensors(q_len, kv_len))
    return BlockMask(mask.kv_num_blocks, mask.kv_indices, q_len, kv_len, 64, 64, window=30, sink=7, last=100)


MASKS = {
    "blocks": lambda q_len, kv_len: select(RandomBlocks(density=0.3), *tensors(q_len, kv_len)),
    "window": lambda q_len, kv_len: select(AShape(init=5, local=70), *tensors(q_len, kv_len)),
    "columns": lambda q_len, kv_len: select(MInference(vertical=40, slash=60), *tensors(q_len, kv_len)),
    "future": columns_in_the_future,
    "last": tri_shape,
}


@pytest.mark.parametrize("lengths", [(512, 512), (413, 413), (200, 413)])
@pytest.mark.parametrize("kind", MASKS)
def test_sampled_error_is_that_of_the_selection(kind, lengths):
    mask = MASKS[kind](*lengths)
    q, k, v = tensors(*lengths)
    out = exact(q, k, v, mask)
    assert sampled_error(out, q, k, v, mask, SCALE) < 1e-5
    assert sampled_error(1.02 * out, q, k, v, mask, SCALE) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("row", [0, 256, 511])
def test_sampled_error_sees_one_wrong_row_of_the_sampled_blocks(row):
    q, k, v = tensors(512, 512)
    mask = MASKS["window"](512, 512)
    wrong = exact(q, k, v, mask)
    wrong[:, 2, row] += 3
    assert sampled_error(wrong, q, k, v, mask, SCALE) > MOST_ERROR
    wrong[:, 2, row] = float("nan")
    assert sampled_error(wrong, q, k, v, mask, SCALE) == float("inf")


def test_sampled_error_tells_the_selection_from_its_neighbours():
    """A kernel that forgets the window, or takes one block more, is not right by accident."""
    q, k, v = tensors(512, 512)
    window, wider = (select(AShape(init=5, local=n), q, k) for n in (70, 71))
    assert sampled_error(exact(q, k, v, wider), q, k, v, window, SCALE) > MOST_ERROR
    fewer, more = (select(RandomBlocks(density=d), q, k) for d in (0.3, 0.4))
    assert sampled_error(exact(q, k, v, more), q, k, v, fewer, SCALE) > MOST_ERROR


def test_no_cpu_time_is_ever_a_result():
    assert Speed.needs_gpu and not Speed.needs_model


def test_a_baseline_that_cannot_run_is_a_blank_with_its_reason(monkeypatch):
    q, k, v = tensors(128, 128)
    ctx = LayerContext(0, "prefill", SCALE, v, torch.arange(128), q=q, k=k)

    def measure(method, q, k, v, ctx):
        ctx.mask = method.select(q, k, ctx)
        yield "total_ms", 2.0, "ms"

    def no_flex(*tensors):
        raise RuntimeError("no such mask\nat all")

    monkeypatch.setattr(speed, "_inputs", lambda cell: (q, k, v, ctx))
    monkeypatch.setattr(speed, "_measure", measure)
    monkeypatch.setattr(speed, "_flex", no_flex)
    monkeypatch.setattr(speed, "event_times", lambda run: torch.tensor([1.0, 2.0, 3.0]) if run() is None else None)
    suite = Speed()
    cell = Cell(SHAPE.name, "", "random", {}, "speed", "attention", 128, None, None, 0, "float32", "cpu")
    scores = {score.metric: score.value for score in suite.run(None, cell)}
    assert scores.keys() == {"total_ms", "fa2_ms", "fa2_p20_ms", "fa2_p80_ms"} and scores["fa2_ms"] == 2
    assert suite.notes["flex"] == "not timed: RuntimeError: no such mask"
    assert suite.notes["cudnn"].startswith("not timed: RuntimeError")  # on a CPU there is none


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method, density", [("dense", None), ("seer", None), ("minference", None), ("a_shape", 0.3), ("random", 0.25)]
)
def test_times_on_a_gpu(method, density):
    params = {"vertical": 64, "slash": 128} if method == "minference" else {}
    cell = Cell(SHAPE.name, "", method, params, "speed", "attention", 1024, density, None, 0, "bfloat16", "gpu")
    suite = Speed()
    scores = {score.metric: score for score in suite.run(None, cell)}
    times = {"total_ms", "fa2_ms", "cudnn_ms"} | (set() if method == "dense" else {"select_ms", "attend_ms"})
    assert times <= set(scores) and all(scores[name].unit == "ms" and scores[name].value > 0 for name in times)
    for name in times:
        low, high = (scores[name.replace("_ms", f"_{p}_ms")].value for p in ("p20", "p80"))
        assert low <= scores[name].value <= high
    measured = scores["density"].value
    assert scores["error_vs_reference"].value < MOST_ERROR
    flops = 4 * SHAPE.head_dim * SHAPE.heads * measured * 1024 * 1025 / 2
    assert scores["tflops"].value == pytest.approx(flops / scores["total_ms"].value / 1e9, rel=1e-3)
    if density is not None:
        assert measured == pytest.approx(density, rel=0.05) and suite.notes["knob"]
    assert ("untrained gate" in suite.notes.get("note", "")) == (method == "seer")
    assert method in ("dense", "minference") or "flex_ms" in scores or "not timed" in suite.notes["flex"]
