"""The latency suite: order, counts, gate and figures on any machine with a timer of the test's own; its times on a GPU."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import Method, dense_attention, select
from sparsebench.methods.dense import Dense
from sparsebench.models import load
from sparsebench.models.attach import attach
from sparsebench.suites import latency
from sparsebench.suites.base import Cell
from sparsebench.suites.latency import BUDGET_MS, LEAST_ROUNDS, TOKENS, WARM_UP, Latency, Variant, check, time_rounds

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 300


@dataclass(frozen=True)
class Off(Method):
    """Dense attention times a factor, under any name."""

    name = "off"
    phases = frozenset({"prefill", "decode"})
    factor: float = 1.0

    def attend(self, q, k, v, ctx):
        return self.factor * dense_attention(q, k, v, ctx.scale)


@dataclass(frozen=True)
class OffDense(Off):
    name = "dense"


@dataclass(frozen=True)
class OffDecode(Off):
    """Right over the prompt, NaN after it."""

    name = "off_decode"

    def attend(self, q, k, v, ctx):
        return dense_attention(q, k, v, ctx.scale) * (float("nan") if ctx.phase == "decode" else 1)


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


@pytest.fixture
def prompts():
    return [torch.randint(1, 28, (1, LENGTH)) for _ in range(2)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    words = "the quick brown fox jumps over the lazy dog and runs away "
    path.write_text("\n".join(f'{{"id": "doc{i}", "text": "{words[i:] * 8}"}}' for i in range(3)))
    return f"file:{path}"


class Model:
    """Records what it is given; the next token is always 0."""

    def __init__(self):
        self.calls = []

    def __call__(self, ids, use_cache, past_key_values, logits_to_keep):
        assert use_cache and logits_to_keep == 1
        self.calls.append((ids.shape[1], int(ids[0, 0]), past_key_values))
        return SimpleNamespace(logits=torch.zeros(1, 1, 4))


def recorded(log, *names, decodes=("", "sdpa")):
    @contextmanager
    def note(name):
        log.append(name)
        yield

    return [Variant(name, lambda name=name: note(name), name in decodes) for name in names]


def slow(run):
    """A timer under which the budget buys the fewest rounds."""
    return run(), BUDGET_MS


def test_variants_take_turns_over_the_same_prompt():
    model, log = Model(), []
    prompts = [torch.full((1, 5), i) for i in (1, 2, 3)]
    times, failed = time_rounds(model, recorded(log, "", "sdpa", "fa2", "cudnn"), prompts, slow)
    rounds = 12  # LEAST_ROUNDS, rounded up to every prompt equally often
    assert log == ["", "sdpa", "fa2", "cudnn"] * (WARM_UP + rounds) and not failed
    prefills = [first for length, first, _ in model.calls if length == 5]
    assert prefills == [1] * 4 * WARM_UP + [1] * 4 + [2] * 4 + [3] * 4 + ([1] * 4 + [2] * 4 + [3] * 4) * 3
    assert list(times) == [
        ("ttft", ""),
        ("decode", ""),
        ("ttft", "sdpa"),
        ("decode", "sdpa"),
        ("ttft", "fa2"),
        ("ttft", "cudnn"),
    ]
    assert {len(values) for values in times.values()} == {rounds} and rounds >= LEAST_ROUNDS


def test_a_pass_prefills_an_empty_cache_and_decodes_with_it():
    model, inside = Model(), []

    def timer(run):
        before = len(model.calls)
        result = run()
        inside.append([length for length, _, _ in model.calls[before:]])
        return result, BUDGET_MS

    time_rounds(model, recorded([], "", "fa2"), [torch.ones(1, 7, dtype=torch.long)], timer)
    assert inside == [[7], [1] * (TOKENS - 1), [7]] * (WARM_UP + LEAST_ROUNDS)
    caches = [cache for _, _, cache in model.calls]
    one = TOKENS + 1  # model calls of a round
    for start in range(0, len(caches), one):
        assert len({id(cache) for cache in caches[start : start + TOKENS]}) == 1
    assert len({id(cache) for cache in caches}) == 2 * (WARM_UP + LEAST_ROUNDS)


def test_a_cheap_round_is_repeated_up_to_the_budget():
    def timer(cost):
        return lambda run: (run(), cost)

    one = [torch.ones(1, 2, dtype=torch.long)]
    for cost, rounds in ((BUDGET_MS / 25, 25), (0.0, latency.MOST_ROUNDS)):
        times, _ = time_rounds(Model(), recorded([], "", decodes=()), one, timer(cost))
        assert len(times["ttft", ""]) == rounds


@pytest.mark.parametrize("works_for", [0, WARM_UP + 3])
def test_a_baseline_that_fails_has_a_reason_and_no_time(works_for):
    passes = []

    @contextmanager
    def breaks():
        passes.append(1)
        if len(passes) > works_for:
            raise RuntimeError("no such kernel\nat all")
        yield

    variants = [*recorded([], ""), Variant("fa2", breaks), *recorded([], "cudnn")]
    times, failed = time_rounds(Model(), variants, [torch.ones(1, 2, dtype=torch.long)], slow)
    assert set(times) == {("ttft", ""), ("decode", ""), ("ttft", "cudnn")}
    assert failed == {"fa2": "not timed: RuntimeError: no such kernel"} and len(passes) == works_for + 1


def test_a_method_that_fails_is_an_error():
    @contextmanager
    def breaks():
        raise RuntimeError("out of memory")
        yield

    with pytest.raises(RuntimeError, match="out of memory"):
        time_rounds(Model(), [Variant("", breaks), *recorded([], "sdpa")], [torch.ones(1, 2, dtype=torch.long)], slow)


@pytest.mark.parametrize("method", [None, Dense()])
def test_decode_is_greedy_generation(loaded, prompts, method):
    expected = loaded.model.generate(
        prompts[0], attention_mask=torch.ones_like(prompts[0]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[:, LENGTH:]  # fmt: skip
    assert expected.unique().numel() > 1
    if method is None:
        found = latency.decode(loaded.model, *latency.prefill(loaded.model, prompts[0]))
    else:
        with attach(loaded.model, method):
            found = latency.decode(loaded.model, *latency.prefill(loaded.model, prompts[0]))
    assert found.tolist() == expected.tolist()


def test_the_gate_lets_what_is_right_through(loaded, prompts):
    for method in (Dense(), OffDense(1.0001), Off(3.0), AShape(init=16, local=64)):
        trace = check(loaded.model, method, prompts)
        assert trace.density.shape == (2, 4)
    assert trace.dense_phases == {"decode"} and trace.impl
    q, k = torch.randn(1, 4, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    assert trace.mean_density == pytest.approx(float(select(AShape(init=16, local=64), q, k).density().mean()))


@pytest.mark.parametrize(
    "method, message",
    [(OffDense(-1.0), "not those of the bare model"), (Off(float("nan")), "not finite"), (OffDecode(), "not finite")],
)
def test_the_gate_stops_what_is_wrong(loaded, prompts, method, message):
    with pytest.raises(ValueError, match=f"{method.name}: .*{message}.*nothing was timed"):
        check(loaded.model, method, prompts)


def test_another_first_token_needs_near_logits():
    expected = torch.tensor([[10.0, 9.9, -3.0]])
    assert latency._same_choice(torch.tensor([[9.9, 10.0, -3.0]]), expected)
    assert latency._same_choice(torch.tensor([[14.0, 2.0, -3.0]]), expected)
    assert not latency._same_choice(torch.tensor([[9.0, 10.0, -3.0]]), expected)


@pytest.fixture
def fake_device(monkeypatch):
    """A clock that gives prefills 100, 101, .. ms and decodes 62 ms, and a memory meter."""
    prefills = iter(range(100, 10_000))

    def timer(run):
        result = run()
        return result, float(next(prefills)) if isinstance(result, tuple) else 62.0

    monkeypatch.setattr(latency, "timed_call", timer)
    monkeypatch.setattr(latency, "peak_memory", lambda run: (run(), 7.0))
    monkeypatch.setattr(latency, "BUDGET_MS", 1.0)
    monkeypatch.setattr(latency, "TOKENS", 3)


@pytest.mark.usefixtures("fake_device")
def test_scores_of_a_cell(loaded, corpus):
    params = {"init": 16, "local": 64}
    cell = Cell("tiny", "", "a_shape", params, "latency", corpus, LENGTH, None, 2, 0, "float32", "gpu")
    suite = Latency()
    rows = list(suite.run(loaded, cell))
    scores = {row.metric: row for row in rows if row.metric != "density"}
    spreads = {f"ttft_{name}{p}ms" for name in ("", "sdpa_", "fa2_") for p in ("", "p20_", "p80_")}
    rates = {"decode_tokens_per_s": "tokens/s", "decode_sdpa_tokens_per_s": "tokens/s"}
    units = dict.fromkeys(spreads, "ms") | rates | {"peak_mb": "MiB", "peak_sdpa_mb": "MiB"}
    assert {name: row.unit for name, row in scores.items()} == units
    # On a CPU there is no cuDNN: it is tried once, and three passes a round remain after 4 + 3 passes of warm-up.
    times = [106.0 + 3 * r for r in range(LEAST_ROUNDS)]
    for name, shift in (("", 0), ("sdpa_", 1), ("fa2_", 2)):
        series = torch.tensor(times) + shift
        for p, part in ((0.5, ""), (0.2, "p20_"), (0.8, "p80_")):
            assert scores[f"ttft_{name}{part}ms"].value == pytest.approx(float(series.quantile(p)))
    assert scores["decode_tokens_per_s"].value == pytest.approx(2 / 0.062)
    assert scores["peak_mb"].value == 7 and {row.example for row in scores.values()} == {loaded.spec.name}
    densities = {row.example: row.value for row in rows if row.metric == "density"}
    assert set(densities) == {f"{layer}/{head}" for layer in range(2) for head in range(4)}
    q, k = torch.randn(1, 4, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    expected = float(select(AShape(**params), q, k).density().mean())
    assert list(densities.values()) == pytest.approx([expected] * 8) and expected < 0.6
    assert suite.notes["cudnn"].startswith("not timed: RuntimeError") and suite.notes["documents"] == 2
    assert suite.notes["rounds"] == LEAST_ROUNDS and suite.notes["dense_phases"] == "decode"


@pytest.mark.usefixtures("fake_device")
def test_prompts_are_the_corpus(loaded, corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "time_rounds", lambda model, variants, prompts, timer: seen.extend(prompts) or ({}, {}))
    cell = Cell("tiny", "", "dense", {}, "latency", corpus, LENGTH, None, 3, 0, "float32", "gpu")
    with pytest.raises(KeyError):  # no times
        list(Latency().run(loaded, cell))
    text = [loaded.tokenizer.decode(ids[0]).replace(" ", "") for ids in seen]
    assert len(text) == 3 and text[1].startswith("hequickbrownfox") and len(set(text)) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method, params", [("dense", {}), ("a_shape", {"init": 64, "local": 128}), ("random", {"density": 0.3})]
)
def test_times_on_a_gpu(model_folder, corpus, monkeypatch, method, params):
    monkeypatch.setattr(latency, "BUDGET_MS", 1.0)
    narrow = load(str(model_folder))
    config = LlamaConfig(**narrow.model.config.to_dict() | {"head_dim": 64})  # the least that the kernel takes
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    loaded = dataclasses.replace(narrow, model=model, spec=dataclasses.replace(narrow.spec, head_dim=64))
    cell = Cell("tiny", "", method, params, "latency", corpus, LENGTH, None, 2, 0, "bfloat16", "gpu")
    suite = Latency()
    rows = list(suite.run(loaded, cell))
    scores = {row.metric: row.value for row in rows if row.metric != "density"}
    for name in ("ttft", "ttft_sdpa"):
        assert 0 < scores[f"{name}_p20_ms"] <= scores[f"{name}_ms"] <= scores[f"{name}_p80_ms"]
    for name in ("fa2", "cudnn"):
        assert f"ttft_{name}_ms" in scores or suite.notes[name].startswith("not timed")
    assert scores["decode_tokens_per_s"] > 0 and scores["decode_sdpa_tokens_per_s"] > 0
    cache = 2 * 2 * 2 * 64 * (LENGTH + TOKENS - 1) * 2 / 2**20  # k and v, layers, heads, channels, tokens, bytes
    assert scores["peak_mb"] > cache and scores["peak_sdpa_mb"] > cache
    densities = [row.value for row in rows if row.metric == "density"]
    assert len(densities) == 8 and (min(densities) == 1 if method == "dense" else max(densities) < 1)
    assert suite.notes["kernel"] == ("sdpa" if method == "dense" else "sdpa+triton") and suite.notes["rounds"] >= LEAST_ROUNDS
