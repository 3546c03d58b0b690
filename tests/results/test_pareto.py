"""Quality against density and time: which points are on a frontier, and which time belongs to which quality."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sparsebench.models.calibrate import TOLERANCE
from sparsebench.results import plots, report
from sparsebench.results.plots import pareto


def add_quality(results, method: str, nll: float, density: float, **fields) -> None:
    scores = {"nll": [nll, nll + 1], "tokens": [10.0, 10.0]}
    results.add(method, "perplexity", "pydoc", 2048, scores, density, unit="nats", **fields)


def add_ttft(results, method: str, ms: float, **fields) -> None:
    results.add(method, "latency", "pydoc", fields.pop("ctx_len", 2048), {"ttft_ms": [ms]}, unit="ms", device="H100", **fields)


def column(frame: pd.DataFrame, name: str) -> dict[str, object]:
    table = pareto(frame)
    return dict(zip(table["label"], table[name]))


def test_density_frontier_with_ties_and_the_frame_left_out(results):
    add_quality(results, "dense", 10.0, 1.0)
    for method, nll, density in (
        ("good", 11.0, 0.2), ("twin", 11.0, 0.2), ("bad", 12.0, 0.2), ("wide", 11.0, 0.3), ("small", 15.0, 0.1),
        ("oracle", 10.5, 0.1), ("random", 10.8, 0.1),
    ):  # fmt: skip
        add_quality(results, method, nll, density)
    frontier = column(results.frame(), "on_density_frontier")
    assert {label for label, on in frontier.items() if on} == {"dense", "good", "twin", "small"}


def test_densities_as_near_as_calibration_turns_knobs_are_one_cost(results):
    assert plots.SAME_DENSITY == 2 * TOLERANCE
    add_quality(results, "dense", 10.0, 1.0)
    for method, nll, density in (
        ("lucky", 12.0, 0.2477), ("good", 11.0, 0.2522), ("cheaper", 12.0, 0.247), ("late", 9.5, 0.995),
    ):  # fmt: skip
        add_quality(results, method, nll, density)
        add_ttft(results, method, 1000 * density)
    add_quality(results, "near", 11.5, 0.3)
    add_ttft(results, "near", 250.0)  # 1 % less time than "good"
    table = pareto(results.frame()).set_index("label")
    assert set(table.index[table["on_density_frontier"]]) == {"late", "good", "cheaper"}
    assert set(table.index[table["on_time_frontier"]]) == {"late", "good", "cheaper", "near"}


def test_a_missing_density_is_on_no_frontier_and_beats_nobody(results):
    add_quality(results, "good", 11.0, 0.2)
    add_quality(results, "unknown", 10.0, None)
    assert column(results.frame(), "on_density_frontier") == {"good": True, "unknown": False}


def test_time_is_the_whole_models_where_there_is_one(results):
    for method, nll, target in (("dense", 10.0, None), ("seer", 11.0, 0.1), ("seer", 10.5, None), ("slow", 12.0, None)):
        add_quality(results, method, nll, 1.0 if method == "dense" else target or 0.3, target=target)
    add_ttft(results, "dense", 100.0)
    add_ttft(results, "seer", 40.0, target=0.1)
    add_ttft(results, "slow", 70.0)
    add_ttft(results, "seer", 1.0, ctx_len=4096)
    add_ttft(results, "seer", 1.0, params={"threshold": 1})
    add_ttft(results, "seer", 1.0, dtype="float16")
    results.add("seer", "speed", "attention", 2048, {"total_ms": [2.0]}, unit="ms", device="H100")
    table = pareto(results.frame()).set_index(["label", "density_target"])
    times = {key if key[1] == key[1] else key[0]: time for key, time in table["time_ms"].items()}
    assert times == {"dense": 100, ("seer", 0.1): 40, "slow": 70, "seer": pytest.approx(math.nan, nan_ok=True)}
    assert set(table["time_source"].dropna()) == {"latency ttft_ms on H100"}
    # slow takes longer than seer at .1 and is worse; seer at its own settings has no time
    assert table["on_time_frontier"].tolist() == [label == "dense" or target == 0.1 for label, target in table.index]


def test_without_latency_the_layers_time_is_named(results):
    for method, nll, ms in (("dense", 10.0, 3.0), ("seer", 11.0, 1.0)):
        add_quality(results, method, nll, 0.5)
        results.add(method, "speed", "attention", 2048, {"total_ms": [ms]}, unit="ms", device="H100", dtype="bfloat16")
    assert column(results.frame(), "time_ms") == {"dense": 3.0, "seer": 1.0}
    assert set(column(results.frame(), "time_source").values()) == {"speed total_ms on H100"}
    assert column(results.frame(), "on_time_frontier") == {"dense": True, "seer": True}


def test_no_times_at_all(results):
    results.add("dense", "speed", "block_map", 2048, {"total_ms": [9.0]}, unit="ms", device="H100", dtype="bfloat16")
    add_quality(results, "dense", 10.0, 1.0)
    table = pareto(results.frame())
    assert table["time_ms"].isna().all() and not table["on_time_frontier"].any() and table["on_density_frontier"].all()
    assert pareto(results.frame().iloc[:0]).empty


def test_accuracy_is_the_mean_over_tasks_and_higher_is_better(results):
    for method, score, density in (("dense", 90.0, 1.0), ("seer", 80.0, 0.2), ("bad", 70.0, 0.2)):
        for task in ("vt", "cwe"):
            results.add(method, "ruler", task, 8192, {"score": [score - 10, score, score + 10]}, density)
    table = pareto(results.frame()).set_index("label")
    assert table["quality"].to_dict() == {"dense": 90, "seer": 80, "bad": 70}
    assert table["on_density_frontier"].to_dict() == {"dense": True, "seer": True, "bad": False}
    # Every example loses exactly ten points: certain, whatever the spread between examples.
    assert table.loc["seer", ["low", "high"]].tolist() == pytest.approx([80, 80])


def test_a_mean_over_fewer_tasks_does_not_compete(results):
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 8192, {"score": [50.0]})
        results.add("seer", "ruler", task, 8192, {"score": [40.0]}, 0.2)
    results.add("part", "ruler", "vt", 8192, {"score": [90.0]}, 0.1)
    assert column(results.frame(), "on_density_frontier") == {"dense": True, "part": False, "seer": True}
    assert column(results.frame(), "tasks") == {"dense": 2, "part": 1, "seer": 2}


def test_perplexitys_interval_is_that_of_the_ratio_to_dense(results):
    add_quality(results, "dense", 10.0, 1.0)
    add_quality(results, "seer", 11.0, 0.2)
    low, high = pareto(results.frame()).set_index("label").loc["seer", ["low", "high"]]
    assert [low, high] == pytest.approx([math.exp(1.15)] * 2)


def test_measurements_do_not_compete_across_contexts_and_settings(results):
    for seed, nll in ((0, 11.0), (1, 10.0)):
        add_quality(results, "seer", nll, 0.2, seed=seed)
    assert pareto(results.frame())["on_density_frontier"].tolist() == [True, True]


def test_plots_and_files(results, tmp_path, monkeypatch):
    figures = []
    save = plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    for method, score, density, ms in (("dense", 90.0, 1.0, 50.0), ("seer", 80.0, 0.2, 20.0), ("bad", 70.0, 0.3, 30.0)):
        for task in ("vt", "cwe"):
            results.add(method, "ruler", task, 2048, {"score": [score - 5, score + 5]}, density)
        add_ttft(results, method, ms)
    report.write(results.frame(), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"ruler-tiny-2k.png", "ruler-time-tiny-2k.png"}
    assert pd.read_csv(tmp_path / "pareto.csv")["on_time_frontier"].sum() == 2
    axes = [figure.axes[0] for figure in figures]
    assert [ax.get_xlabel() for ax in axes] == [plots.DENSITY_LABEL, "latency ttft on H100, ms"]
    for ax, xs in zip(axes, ([0.2, 1.0], [20, 50])):
        (step,) = [line for line in ax.lines if line.get_label() == "frontier"]
        assert list(step.get_xdata()) == xs and list(step.get_ydata()) == [80, 90]
        assert step.get_drawstyle() == "steps-post" and "higher is better" in ax.get_ylabel()
