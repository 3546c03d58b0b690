"""Means over a suite's tasks, RULER's weighted averages and its effective length."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sparsebench.results.report import leaderboard
from sparsebench.results.tables import overview
from sparsebench.results.text import print_table

# GPT-4-1106-preview in the table of NVIDIA/RULER's README: means at 4k to 128k, effective length 64k, wAvg 89.0 and 94.1.
GPT4 = {4096: 96.6, 8192: 96.3, 16384: 95.2, 32768: 93.2, 65536: 87.0, 131072: 81.2}


def values(frame: pd.DataFrame, label: str = "dense") -> dict[tuple[str, int], float]:
    table = overview(frame)
    table = table[table["label"] == label]
    return dict(zip(zip(table["metric"], table["ctx_len"]), table["value"]))


def test_weighted_averages_and_effective_length_are_nvidias(results):
    for ctx_len, score in GPT4.items():
        for task, shift in (("vt", 1.0), ("cwe", -1.0)):
            results.add("dense", "ruler", task, ctx_len, {"score": [score + shift] * 2})
    found = values(results.frame())
    assert [found["mean", ctx_len] for ctx_len in GPT4] == pytest.approx(list(GPT4.values()))
    assert round(found["wavg_inc", 0], 1) == 89.0 and round(found["wavg_dec", 0], 1) == 94.1
    assert found["effective_length", 0] == 65536
    board = leaderboard(results.frame())
    assert board["ruler wavg_inc"][0] == found["wavg_inc", 0] and board["ruler wavg_dec"][0] == found["wavg_dec", 0]
    assert board["ruler effective_length"][0] == 65536 and board["ruler mean 8k"][0] == pytest.approx(96.3)
    assert board["ruler mean 8k tasks"][0] == 2
    title, header, _, line = print_table(results.frame()).splitlines()[:4]
    assert title == "ruler, org/tiny, means over tasks, tasks = 2 of 13"
    assert header.split()[-5:] == ["wavg", "inc", "wavg", "dec", "effective"] and line.split()[-1] == "64k"


@pytest.mark.parametrize(
    "scores, tokens, said",
    [
        ([85.6, 50.0], 0, "<4k"),  # the threshold itself is not above it
        ([90.0, 85.7], 8192, ">=8k"),
        ([90.0, 50.0], 4096, "4k"),
        ([50.0, 90.0], 8192, ">=8k"),  # the longest that passes, whatever shorter ones do
    ],
)
def test_effective_length(results, scores, tokens, said):
    for ctx_len, score in zip((4096, 8192), scores):
        for task in ("vt", "cwe"):
            results.add("dense", "ruler", task, ctx_len, {"score": [score] * 2})
    assert values(results.frame())["effective_length", 0] == tokens
    assert print_table(results.frame()).splitlines()[3].split()[-1] == said


def test_one_length_has_no_weighted_average(results):
    results.add("dense", "ruler", "vt", 4096, {"score": [100.0]})
    assert values(results.frame()) == {("mean", 4096): 100, ("effective_length", 0): 4096}


def test_lengths_with_other_tasks_are_not_averaged(results):
    for task, ctx_len in (("vt", 4096), ("cwe", 4096), ("vt", 8192)):
        results.add("dense", "ruler", task, ctx_len, {"score": [90.0, 70.0]})
    table = overview(results.frame())
    assert table["metric"].tolist() == ["mean", "mean"] and table["tasks"].tolist() == [2, 1]


def test_tasks_weigh_alike_and_are_resampled_each_by_itself(results):
    results.add("dense", "ruler", "vt", 4096, {"score": [100.0] * 9 + [0.0]})
    results.add("dense", "ruler", "cwe", 4096, {"score": [100.0, 0.0]})
    mean = overview(results.frame()).query("metric == 'mean'").iloc[0]
    assert mean["value"] == 70 and mean["n"] == 12
    assert mean["se"] == pytest.approx(50 * math.sqrt(0.1 / 10 + 0.5 / 2))  # sample variances .1 and .5 of 0/1
    assert mean["low"] < 70 < mean["high"]


def test_means_are_compared_with_dense_over_equal_tasks(results):
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 4096, {"score": [100.0] * 4})
        results.add("sparse", "ruler", task, 4096, {"score": [0.0, 0.0, 0.0, 100.0]}, 0.2)
    results.add("part", "ruler", "vt", 4096, {"score": [0.0] * 4}, 0.1)
    table = overview(results.frame()).set_index(["label", "metric"])
    sparse, part = table.loc[("sparse", "mean")], table.loc[("part", "mean")]
    # Six of eight answers are lost, three in each task: exact, although no task alone has enough examples.
    assert sparse["diff"] == -75 and sparse["p_dense"] == pytest.approx(2 / 2**6) and sparse["mark"] == "worse"
    assert sparse["density"] == pytest.approx(0.2)
    assert part["value"] == 0 and part["tasks"] == 1 and part["mark"] == "" and pd.isna(part["diff"])
    text = print_table(results.frame())
    assert "tasks" in text.splitlines()[1] and "1 of 13" in text and "25.0 [0.0, 50.0] worse" in text


def test_versus_in_the_means(results):
    for method, right in (("seer", 0.0), ("other", 100.0)):
        for task in ("vt", "cwe"):
            results.add(method, "ruler", task, 4096, {"score": [right] * 4}, 0.1, target=0.1)
    found = overview(results.frame(), versus="seer").set_index(["label", "metric"]).loc[("other", "mean")]
    assert found["diff_versus"] == 100 and found["mark_versus"] == "better"
    lines = print_table(results.frame(), versus="seer").splitlines()
    start = lines.index("ruler, org/tiny, means over tasks, difference to seer, tasks = 2 of 13")
    assert lines[start + 3].split() == ["other", "0.1", "0.1", "+100.0", "better"]


def test_targets_and_own_settings_stand_side_by_side(results):
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 4096, {"score": [100.0] * 3})
        for target, score in ((None, 90.0), (0.1, 50.0), (0.25, 80.0)):
            results.add("seer", "ruler", task, 4096, {"score": [score] * 3}, target or 0.4, target=target)
    lines = print_table(results.frame()).splitlines()[3:7]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["seer", "0.1", "0.1"],
        ["seer", "0.25", "0.25"],
        ["seer", "0.4", "90.0"],
    ]


def test_longbench_and_its_even_subset_are_two_means(results):
    for task, score in (("qasper", 40.0), ("trec", 60.0), ("qasper_e", 10.0), ("trec_e", 30.0)):
        scores = {"score": [score] * 3}
        if task.endswith("_e"):
            scores |= {"score_0_4k": [score + 5], "score_8k": [score - 5] * 2}
        results.add("dense", "longbench", task, 8192, scores)
    table = overview(results.frame())
    found = {(r.task, r.metric): (r.value, r.tasks, r.tasks_of) for r in table.itertuples()}
    assert found == {
        ("", "mean"): (50, 2, 21), ("e", "mean"): (20, 2, 13), ("e", "mean_0_4k"): (25, 2, 13), ("e", "mean_8k"): (15, 2, 13),
    }  # fmt: skip
    assert {"longbench mean 8k", "longbench e mean 8k", "longbench e mean_0_4k 8k"} <= set(leaderboard(results.frame()).columns)


def test_texts_mix_over_tasks_but_not_within_one(results):
    results.add("dense", "ruler", "vt", 4096, {"score": [100.0]})
    results.add("dense", "ruler", "niah_single_2", 4096, {"score": [0.0]}, inputs="one")
    assert values(results.frame())["mean", 4096] == 50
    results.add("dense", "ruler", "niah_single_2", 4096, {"score": [50.0]}, inputs="two")
    table = overview(results.frame())
    means = table[table["metric"] == "mean"]
    assert dict(zip(means["inputs"], means["value"])) == {"": 100, "one": 0, "two": 50}


def test_many_lengths_fit_a_terminal(results):
    for method, label in (("dense", "dense"), ("minference", "minference(vertical=100)")):
        for ctx_len in GPT4:
            for task in ("vt", "cwe"):
                scores = [100.0, 33.3, 66.7, 0.0, 100.0, 50.0]
                results.add(method, "ruler", task, ctx_len, {"score": scores}, 0.12345, facts={"label": label}, target=0.1)
    for count, cell in ((6, "58.3="), (3, "58.3 same"), (1, "] same")):
        frame = results.frame()
        text = print_table(frame[frame["ctx_len"].isin(list(GPT4)[:count])])
        assert max(map(len, text.splitlines())) <= 120 and cell in text, text
        assert ("+ = - better, same, worse than dense" in text) == (count == 6)


def test_no_suite_of_many_tasks(results):
    results.add("dense", "perplexity", "pydoc", 2048, {"nll": [1.0], "tokens": [1.0]})
    assert overview(results.frame()).empty and overview(results.frame().iloc[:0]).empty


def test_a_mean_over_fewer_tasks_is_marked(results):
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 4096, {"score": [100.0] * 4})
    results.add("dense", "ruler", "vt", 8192, {"score": [40.0] * 4})
    title, _, _, line = print_table(results.frame()).splitlines()[:4]
    assert "* over fewer tasks" in title and "40.0*" in line.replace(" [40.0, 40.0]", "") and "100.0*" not in line
