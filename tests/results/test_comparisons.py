"""Comparisons with dense and with a chosen method, their marks, and what looks wrong."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from sparsebench.results.report import leaderboard
from sparsebench.results.tables import summary
from sparsebench.results.text import print_table

RIGHT = [100.0] * 20


def wrong(count: int) -> list[float]:
    return [0.0] * count + RIGHT[count:]


def row(frame: pd.DataFrame, label: str, metric: str = "score", **options: str) -> pd.Series:
    table = summary(frame, **options)
    (found,) = [r for _, r in table[(table["label"] == label) & (table["metric"] == metric)].iterrows()]
    return found


def add_nll(results, method: str, losses: list[float], **fields) -> None:
    scores = {"nll": losses, "tokens": [10.0] * len(losses)}
    results.add(method, "perplexity", "pydoc", 2048, scores, unit="nats", **fields)


def test_difference_p_value_and_mark_of_an_accuracy(results):
    results.add("dense", "ruler", "vt", 4096, {"score": wrong(2)})
    results.add("near", "ruler", "vt", 4096, {"score": wrong(5)}, 0.2)
    results.add("far", "ruler", "vt", 4096, {"score": wrong(10)}, 0.1)
    results.add("above", "ruler", "vt", 4096, {"score": RIGHT}, 0.1)
    found = {label: row(results.frame(), label) for label in ("dense", "near", "far", "above")}
    assert [found[label]["diff"] for label in found] == [0, -15, -40, 10]
    assert [found[label]["p_dense"] for label in ("near", "far", "above")] == pytest.approx([2 / 8, 2 / 2**8, 2 / 4])
    assert [found[label]["mark"] for label in found] == ["", "same", "worse", "same"]
    assert found["far"]["diff_low"] < -40 < found["far"]["diff_high"] < 0 and pd.isna(found["dense"]["p_dense"])
    board = leaderboard(results.frame()).set_index("label")
    assert board.loc["far", "ruler vt score 4k mark"] == "worse" and board.loc["far", "ruler vt score 4k diff"] == -40


def test_less_perplexity_is_better(results):
    dense = [20.0 + i for i in range(6)]
    add_nll(results, "dense", dense)
    for method, change in (("above", 1.0), ("below", -1.0)):
        add_nll(results, method, [loss + change * (1 + i / 9) for i, loss in enumerate(dense)], density=0.2)
    marks = {label: row(results.frame(), label, "perplexity") for label in ("above", "below")}
    assert {label: found["mark"] for label, found in marks.items()} == {"above": "worse", "below": "better"}
    assert marks["above"]["p_dense"] == pytest.approx(2 / 2**6)
    total = sum(dense) / 60
    assert marks["above"]["diff"] == pytest.approx(math.exp(total + (6 + 15 / 9) / 60) - math.exp(total))


def test_so_few_examples_have_no_mark(results):
    for method, scores in (("dense", [100.0] * 5), ("sparse", [0.0] * 5)):
        results.add(method, "ruler", "vt", 4096, {"score": scores})
    found = row(results.frame(), "sparse")
    assert found["mark"] == "n<6" and found["p_dense"] == pytest.approx(2 / 2**5) and found["diff"] == -100
    text = print_table(results.frame())
    assert "mark" not in text.splitlines()[1] and "marks:" not in text


def test_dense_at_zero_has_a_difference_but_no_ratio(results):
    results.add("dense", "ruler", "vt", 4096, {"score": [0.0] * 8})
    results.add("sparse", "ruler", "vt", 4096, {"score": [100.0] * 8})
    found = row(results.frame(), "sparse")
    assert found["diff"] == 100 and pd.isna(found["vs_dense"]) and found["mark"] == "better"
    assert "check: sparse beats dense in score, vt 4k (+100), p = 0.0078" in print_table(results.frame())


def test_without_dense_there_is_nothing_to_compare(results):
    results.add("sparse", "ruler", "vt", 4096, {"score": RIGHT})
    found = row(results.frame(), "sparse")
    assert found["mark"] == "" and found[["diff", "p_dense", "vs_dense"]].isna().all()
    assert "vs dense" not in print_table(results.frame())


def test_options_are_measurements_of_their_own(results):
    results.add("dense", "ruler", "vt", 4096, {"score": RIGHT}, options={"chat_template": True})
    results.add("sparse", "ruler", "vt", 4096, {"score": wrong(9)})
    assert row(results.frame(), "sparse")["mark"] == ""
    assert {"ruler vt score 4k options={}", 'ruler vt score 4k options={"chat_template":true}'} <= set(
        leaderboard(results.frame()).columns
    )
    assert "chat_template=True" in print_table(results.frame())
    old = results.frame().drop(columns="options")
    assert set(summary(old)["options"]) == {"{}"}


def test_versus_pairs_rows_of_one_density_target(results):
    for target, failures in ((None, 4), (0.1, 12), (0.25, 6)):
        results.add("seer", "ruler", "vt", 4096, {"score": wrong(failures)}, target=target)
    for target, failures in ((None, 0), (0.1, 2), (0.5, 1)):
        results.add("other", "ruler", "vt", 4096, {"score": wrong(failures)}, target=target)
    table = summary(results.frame(), versus="seer").set_index(["label", "density_target"])
    found = {target: table.loc[("other", target)] for target in (0.1, 0.5)} | {
        None: table[table.index.get_level_values(1).isna()].loc["other"].iloc[0]
    }
    assert found[None]["diff_versus"] == 20 and found[None]["p_versus"] == pytest.approx(2 / 2**4)
    assert found[0.1]["diff_versus"] == 50 and found[0.1]["mark_versus"] == "better"
    assert pd.isna(found[0.5]["diff_versus"]) and found[0.5]["mark_versus"] == ""
    own = table.loc[("seer", 0.1)]
    assert own["diff_versus"] == 0 and pd.isna(own["p_versus"]) and own["mark_versus"] == ""
    assert "diff_versus" not in summary(results.frame())
    lines = print_table(results.frame(), versus="seer").splitlines()
    assert "vs seer" in lines[1] and any("+50.0 better" in line for line in lines)


def test_versus_takes_a_label_before_a_name(results):
    results.add("other", "ruler", "vt", 4096, {"score": RIGHT})
    for threshold, failures in ((0.5, 10), (0.9, 20)):
        facts = {"label": "seer" if threshold == 0.9 else "seer(threshold=0.5)"}
        results.add("seer", "ruler", "vt", 4096, {"score": wrong(failures)}, params={"threshold": threshold}, facts=facts)
    assert row(results.frame(), "other", versus="seer")["diff_versus"] == 100
    assert row(results.frame(), "other", versus="seer(threshold=0.5)")["diff_versus"] == 50


def test_versus_dense_compares_every_target(results):
    results.add("dense", "ruler", "vt", 4096, {"score": RIGHT})
    results.add("sparse", "ruler", "vt", 4096, {"score": wrong(10)}, target=0.1)
    assert row(results.frame(), "sparse", versus="dense")[["diff_versus", "mark_versus"]].tolist() == [-50, "worse"]


def test_versus_must_exist(results):
    results.add("dense", "ruler", "vt", 4096, {"score": RIGHT})
    results.add("seer", "ruler", "vt", 4096, {"score": RIGHT})
    for call in (summary, print_table):
        with pytest.raises(ValueError, match=r"no finished results of 'sear' to compare with; there are dense, seer$"):
            call(results.frame(), versus="sear")


def test_fidelity_is_compared_with_a_method_but_not_with_dense(results):
    scores = {"dense": 1.0, "good": 0.9, "bad": 0.5}
    for method, value in scores.items():
        values = {"recall": [value - i / 50 for i in range(7)], "error": [1 - value + i / 60 for i in range(7)]}
        results.add(method, "fidelity", "pydoc", 2048, values, unit="ratio")
    frame = results.frame().assign(example=lambda f: f["example"] + "/0/0")
    for metric in ("recall", "error"):
        good = row(frame, "good", metric, versus="bad")
        assert good["mark"] == "" and pd.isna(good["diff"]) and good["mark_versus"] == "better"


def test_significant_wins_are_alarms_with_p_and_the_number_of_comparisons(results):
    results.add("dense", "ruler", "vt", 4096, {"score": wrong(12)})
    results.add("lucky", "ruler", "vt", 4096, {"score": wrong(8)}, 0.2)
    results.add("wrong", "ruler", "vt", 4096, {"score": RIGHT}, 0.2)
    text = print_table(results.frame())
    assert "check: wrong beats dense in score, vt 4k (2.5 of dense), p = 0.00049" in text and "lucky beats" not in text
    # The task and the mean over the one task are the same comparison, printed and counted once.
    assert "marks: 2 comparisons with dense at p < 0.05: at most about 0.1 would say worse or better" in text


def test_a_win_within_rounding_is_no_alarm(results):
    add_nll(results, "dense", [20.0] * 8)
    add_nll(results, "sparse", [20.0 - 1e-6] * 8, density=0.2)
    assert row(results.frame(), "sparse", "perplexity")["mark"] == "better"
    assert "check:" not in print_table(results.frame())


def test_latency_is_shown_like_speed(results):
    times = {"ttft_ms": 50.0, "ttft_p20_ms": 49.0, "ttft_sdpa_ms": 60.0, "ttft_fa2_ms": 100.0, "ttft_cudnn_ms": 75.0}
    times |= {"decode_tokens_per_s": 30.0, "decode_sdpa_tokens_per_s": 40.0, "peak_mb": 2000.0, "density": 0.25}
    for method in ("dense", "seer"):
        results.add(method, "latency", "pydoc", 8192, {name: [value] for name, value in times.items()}, device="H100")
    found = summary(results.frame()).set_index(["label", "metric"])
    expected = {"ttft_speedup_fa2": 2.0, "ttft_speedup_cudnn": 1.5, "ttft_speedup_sdpa": 1.2, "decode_speedup_sdpa": 0.75}
    assert {name: found.loc[("seer", name), "value"] for name in expected} == pytest.approx(expected)
    assert found[["low", "diff", "p_dense"]].isna().all(axis=None) and set(found["mark"]) == {""}
    header = print_table(results.frame()).splitlines()[1]
    columns = ["method", "ctx", "density", "ttft ms", "x sdpa", "x fa2", "x cudnn", "decode/s", "decode x sdpa", "MiB"]
    assert header.split() == " ".join(columns).split()
    board = leaderboard(results.frame())
    assert {"latency pydoc ttft_ms 8k", "latency pydoc ttft_speedup_fa2 8k"} <= set(board.columns)
    assert not [name for name in board.columns if name.endswith((" se", " n", " mark"))]


def test_accuracy_tables_say_how_the_question_was_read(results):
    for method, question in (("dense", "dense"), ("sparse", "sparse")):
        scores = {"harness_score": [0.5] * 20, "score": RIGHT}
        results.add(method, "ruler", "niah_multikey_1", 131072, scores, facts={"question": question, "dense_phases": "decode"})
    lines = print_table(results.frame()).splitlines()
    assert lines[1].split() == ["method", "ctx", "question", "density", "score", "vs", "dense", "mark", "harness"]
    assert " ".join(lines[4].split()) == "sparse 128k sparse 1 100.0 [100.0, 100.0] +0.0 [+0.0, +0.0] same 0.5"
    assert leaderboard(results.frame())["question"].tolist() == ["dense", "sparse"]


def test_accuracy_tables_fit_a_terminal(results):
    label = {"label": "minference(vertical=100)", "question": "partly dense"}
    for task in ("niah_multikey_1", "qa_2"):
        for method, share in (("dense", 2), ("minference", 3)):
            scores = [100 / share + i for i in range(40)]
            target = None if method == "dense" else 0.25
            results.add(
                method, "ruler", task, 131072, {"score": scores, "harness_score": scores}, 0.12345, facts=label, target=target
            )
    text = print_table(results.frame())
    assert max(map(len, text.splitlines())) <= 120, text
