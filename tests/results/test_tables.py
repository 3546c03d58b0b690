"""Aggregates against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from sparsebench.results.report import leaderboard
from sparsebench.results.store import Store
from sparsebench.results.tables import ctx_name, summary
from sparsebench.results.text import print_table
from sparsebench.suites.base import Cell, Score

DENSE = Cell(
    model="tiny", revision="r", method="dense", params={}, suite="perplexity", task="pydoc", ctx_len=2048, density=None,
    limit=None, seed=0, dtype="float32",
)  # fmt: skip
SEER = dataclasses.replace(DENSE, method="seer", params={"threshold": 0.5})


def nll(documents: dict[str, tuple[float, int]], suffix: str = "") -> list[Score]:
    """Scores of documents {name: (nll, tokens)}."""
    pairs = [(f"nll{suffix}", 0, "nats"), (f"tokens{suffix}", 1, "tokens")]
    return [Score("pydoc", name, metric, value[i], unit) for name, value in documents.items() for metric, i, unit in pairs]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as opened:
        yield opened


def pick(frame: pd.DataFrame, metric: str, method: str = "dense") -> pd.Series:
    table = summary(frame)
    rows = table[(table["metric"] == metric) & (table["method"] == method)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_perplexity_is_exp_of_total_nll_by_total_tokens(store):
    documents = {"a": (20.0, 10), "b": (30.0, 30), "c": (10.0, 10)}
    store.write(DENSE, nll(documents) + nll({"a": (8.0, 4), "b": (4.0, 4), "c": (6.0, 4)}, "_last256"), {}, density=1.0)
    row = pick(store.frame(), "perplexity")
    assert row["value"] == pytest.approx(math.exp(60 / 50), rel=1e-12)  # neither exp(mean of means) nor mean of exp
    # residuals nll - 1.2 tokens: 8, -6, -2; squares sum to 104; exp'(r) = perplexity
    assert row["se"] == pytest.approx(math.exp(1.2) * math.sqrt(3 / 2 * 104) / 50, rel=1e-12)
    assert row["n"] == 3 and row["low"] < row["value"] < row["high"]
    assert pick(store.frame(), "perplexity_last256")["value"] == pytest.approx(math.exp(18 / 12), rel=1e-12)
    assert set(summary(store.frame())["metric"]) == {"perplexity", "perplexity_last256"}


def test_one_document_has_no_interval(store):
    store.write(DENSE, nll({"a": (20.0, 10)}), {}, density=1.0)
    row = pick(store.frame(), "perplexity")
    assert row["n"] == 1 and row["value"] == pytest.approx(math.exp(2))
    assert row[["se", "low", "high"]].isna().all()
    assert "[" not in print_table(store.frame())


def test_interval_is_seeded_and_covers(store):
    values = np.random.default_rng(3).normal(50, 10, 200)
    cell = dataclasses.replace(DENSE, suite="ruler", task="niah")
    store.write(cell, [Score("niah", str(i), "match", v, "%") for i, v in enumerate(values)], {}, density=1.0)
    row, again = pick(store.frame(), "match"), pick(store.frame(), "match")
    assert row["value"] == pytest.approx(values.mean())
    se = values.std(ddof=1) / math.sqrt(200)
    assert row["se"] == pytest.approx(se, rel=1e-9)
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * se, rel=0.1)
    assert (row["low"], row["high"]) == (again["low"], again["high"])


def test_ratio_to_dense_is_paired(store):
    dense = {"a": (20.0, 10), "b": (30.0, 30), "c": (10.0, 10)}
    store.write(DENSE, nll(dense), {}, density=1.0)
    # Every document loses the same per token, in another order: the ratio is certain although documents differ widely.
    store.write(SEER, nll({name: (dense[name][0] + 0.1 * dense[name][1], dense[name][1]) for name in "cab"}), {}, density=0.2)
    row = pick(store.frame(), "perplexity", "seer")
    assert row[["vs_dense", "vs_low", "vs_high"]].tolist() == pytest.approx([math.exp(0.1)] * 3, rel=1e-9)
    assert row["high"] - row["low"] > 0.5
    assert pick(store.frame(), "perplexity")["vs_dense"] == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"limit": 5}, {"dtype": "float16"}, {"ctx_len": 4096}, {"revision": "s"}])
def test_no_ratio_to_a_different_measurement(store, change):
    store.write(dataclasses.replace(DENSE, **change), nll({"a": (20.0, 10), "b": (9.0, 9)}), {}, density=1.0)
    store.write(SEER, nll({"a": (21.0, 10), "b": (9.0, 9)}), {}, density=0.2)
    assert pd.isna(pick(store.frame(), "perplexity", "seer")["vs_dense"])


def test_no_ratio_to_other_documents(store):
    store.write(DENSE, nll({"a": (20.0, 10), "x": (9.0, 9)}), {}, density=1.0)
    store.write(SEER, nll({"a": (21.0, 10), "b": (9.0, 9)}), {}, density=0.2)
    assert pd.isna(pick(store.frame(), "perplexity", "seer")["vs_dense"])


def test_fidelity_averages_layers_and_heads_but_counts_documents(store):
    cell = dataclasses.replace(SEER, suite="fidelity")
    values = {"a/x": (0.9, 0.7, 0.8, 0.6), "b": (0.5, 0.5, 0.7, 0.7)}
    scores = [
        Score("pydoc", f"{document}/{i // 2}/{i % 2}", metric, value, "ratio")
        for document, heads in values.items()
        for i, recall in enumerate(heads)
        for metric, value in (("recall", recall), ("density", 0.1 * (i + 1)))
    ]
    store.write(cell, scores, {})
    row = pick(store.frame(), "recall", "seer")
    assert row["value"] == pytest.approx(0.675) and row["n"] == 2
    assert row["se"] == pytest.approx(0.075)  # of the document means 0.75 and 0.6
    assert row[["density", "density_min", "density_max"]].tolist() == pytest.approx([0.25, 0.1, 0.4])
    assert list(summary(store.frame())["metric"]) == ["recall"] and pd.isna(row["vs_dense"])


def test_speed_ratios(store):
    cell = dataclasses.replace(SEER, suite="speed", task="attention", device="H100")
    times = {
        "total_ms": 2.5,
        "total_p20_ms": 2.4,
        "select_ms": 0.5,
        "fa2_ms": 10.0,
        "cudnn_ms": 5.0,
        "flex_ms": 4.0,
        "density": 0.2,
    }
    store.write(cell, [Score("attention", "shape", name, value, "ms") for name, value in times.items()], {})
    values = summary(store.frame()).set_index("metric")["value"]
    expected = {"speedup_fa2": 4.0, "speedup_cudnn": 2.0, "speedup_flex": 1.6, "of_best_dense": 0.4, "total_ms": 2.5}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert "total_p20_ms" in values and "p20" not in print_table(store.frame())
    assert not [name for name in values.index if name.startswith(("attend_", "backward_")) or name == "of_matmul"]


def test_speed_ratios_of_the_halves(store):
    cell = dataclasses.replace(SEER, suite="speed", task="attention", device="H100", options={"backward": True})
    times = {"total_ms": 2.5, "attend_ms": 2.0, "backward_ms": 4.0, "fa2_ms": 10.0, "fa4_ms": 4.0, "fa4_sparse_ms": 3.0}
    times |= {"fa2_backward_ms": 30.0, "cudnn_backward_ms": 20.0, "flex_backward_ms": 8.0, "density": 0.1}
    rates = {"tflops": 400.0, "attend_tflops": 500.0, "backward_tflops": 600.0, "matmul_tflops": 800.0}
    scores = [Score("attention", "shape", name, value, "ms") for name, value in times.items()]
    store.write(cell, scores + [Score("attention", "shape", name, value, "TFLOP/s") for name, value in rates.items()], {})
    values = summary(store.frame()).set_index("metric")["value"]
    expected = {"speedup_fa4": 1.6, "speedup_fa4_sparse": 1.2, "of_best_dense": 0.16, "of_matmul": 0.5}
    expected |= {"attend_speedup_fa4": 2.0, "attend_speedup_fa4_sparse": 1.5, "attend_of_best_dense": 0.2}
    expected |= {"attend_of_matmul": 0.625, "backward_speedup_fa2": 7.5, "backward_speedup_flex": 2.0}
    expected |= {"backward_of_best_dense": 0.5, "backward_of_matmul": 0.75}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert "backward_speedup_fa4" not in values and "fa4_backward_ms" not in values


def test_leaderboard_has_a_row_per_method_and_params(store):
    documents = {"a": (20.0, 10), "b": (9.0, 9)}
    for ctx_len in (2048, 8192):
        for cell, label in ((DENSE, "dense"), (SEER, "seer"), (dataclasses.replace(SEER, density=0.1), "seer")):
            density = 0.2 if cell.method == "seer" else 1.0
            store.write(dataclasses.replace(cell, ctx_len=ctx_len), nll(documents), {"label": label}, density=density)
    other = dataclasses.replace(SEER, params={"threshold": 0.9})
    store.write(other, nll(documents), {"note": "untrained gate"}, density=0.3, density_range=(0.1, 0.5))
    store.write(dataclasses.replace(other, suite="fidelity"), [Score("pydoc", "a/0/0", "recall", 0.5, "ratio")], {})
    board = leaderboard(store.frame())
    assert list(board["label"]) == ["dense", "seer", "seer", "seer(threshold=0.9)"]
    assert board["density_target"].tolist()[1] == 0.1
    expected = math.exp(29 / 19)
    assert board["perplexity pydoc 2k"].tolist() == pytest.approx([expected] * 4)
    assert board["perplexity pydoc 8k"].tolist()[:3] == pytest.approx([expected] * 3) and pd.isna(
        board["perplexity pydoc 8k"][3]
    )
    assert board["perplexity pydoc 2k density"].tolist() == [1.0, 0.2, 0.2, 0.3] and board["perplexity pydoc 2k n"][0] == 2
    assert board["perplexity pydoc 2k vs_dense"].tolist() == pytest.approx([1.0] * 4)
    assert board["perplexity pydoc 2k density_max"].tolist()[3] == 0.5
    assert board["fidelity pydoc recall 2k"][3] == 0.5 and board["note"].tolist() == ["", "", "", "untrained gate"]


def test_different_settings_never_mix(store):
    store.write(dataclasses.replace(DENSE, limit=1), nll({"a": (20.0, 10)}), {}, density=1.0)
    store.write(dataclasses.replace(DENSE, limit=2), nll({"a": (20.0, 10), "b": (9.0, 9)}), {}, density=1.0)
    board = leaderboard(store.frame())
    assert len(board) == 1
    assert board["perplexity pydoc 2k limit=1"][0] == pytest.approx(math.exp(2))
    assert board["perplexity pydoc 2k limit=2"][0] == pytest.approx(math.exp(29 / 19))


def test_failed_and_skipped_cells_count_nowhere_and_are_named(store):
    store.write(DENSE, nll({"a": (20.0, 10)}), {}, density=1.0)
    long = dataclasses.replace(DENSE, ctx_len=32768)
    for cell, label in ((long, "dense"), (dataclasses.replace(long, method="seer"), "seer")):
        store.write(cell, [], {"label": label}, status="skipped", reason="the model's limit is 8192 tokens")
    store.write(SEER, [*nll({"a": (20.0, 10)}), Score("pydoc", "b", "nll", math.nan, "nats")], {"label": "seer"}, density=0.1)
    text = print_table(store.frame())
    assert "perplexity 32k skipped: the model's limit is 8192 tokens (dense, seer)" in text
    assert "perplexity 2k failed: nll of example 'b' of pydoc is nan (seer)" in text
    assert len(summary(store.frame())) == 1 and list(leaderboard(store.frame())["method"]) == ["dense"]


def test_beating_dense_is_an_alarm(store):
    dense = {"a": (20.0, 10), "b": (9.0, 9), "c": (10.0, 8)}
    store.write(DENSE, nll(dense), {}, density=1.0)
    assert "check:" not in print_table(store.frame())
    store.write(
        SEER, nll({name: (loss - 0.1 * tokens, tokens) for name, (loss, tokens) in dense.items()}), {"label": "seer"}, 0.1
    )
    assert "check: seer beats dense in perplexity, pydoc 2k (0.9048 of dense)" in print_table(store.frame())


def test_terminal_table_gives_interval_density_and_target(store):
    store.write(
        dataclasses.replace(SEER, density=0.25), nll({"a": (20.0, 10), "b": (9.0, 9)}), {"label": "seer(x)"}, density=0.2431
    )
    title, header, _, line = print_table(store.frame()).splitlines()[:4]
    assert title == "perplexity, tiny, pydoc, n = 2"
    assert header.split() == ["method", "ctx", "target", "density", "perplexity"]
    assert line.split()[:4] == ["seer(x)", "2k", "0.25", "0.2431"] and "4.601 [2.718, 7.389]" in line


def test_tables_fit_a_terminal(store):
    """Two files with the widest rows a suite prints; of the files the names, of their content nothing."""
    folder = "file:/somewhere/rather/deep/in/a/file/system/"
    for task, inputs in ((f"{folder}books.jsonl", "1" * 16), (f"{folder}proofs.jsonl", "2" * 16)):
        for cell in (DENSE, dataclasses.replace(SEER, density=0.25)):
            cell = dataclasses.replace(cell, task=task, inputs=inputs)
            rows = nll({"a": (2345.0, 1000), "b": (2987.0, 1001)}) + nll({"a": (611.1, 256), "b": (733.3, 256)}, "_last256")
            rows = [dataclasses.replace(score, task=task) for score in rows]
            store.write(cell, rows, {"label": "minference(vertical=100)"}, density=0.123456)
    speed = dataclasses.replace(SEER, suite="speed", task="attention", device="H100", ctx_len=131072)
    names = ["total_ms", "select_ms", "attend_ms", "fa2_ms", "cudnn_ms", "flex_ms", "tflops", "peak_mb", "density"]
    store.write(dataclasses.replace(speed, method="dense"), [Score("attention", "s", "total_ms", 9.0, "ms")], {}, density=1.0)
    scores = [Score("attention", "s", name, 1234.5678 / (1 + 9 * i), "") for i, name in enumerate(names)]
    more = ["fa3_ms", "fa4_ms", "fa4_sparse_ms", "matmul_tflops", "attend_tflops", "backward_ms", "fa2_backward_ms"]
    widest = dataclasses.replace(speed, task="kernel_128x128", model="wide")
    store.write(widest, scores + [Score("attention", "s", name, 1234.5678, "") for name in more], {}, density=0.123456)
    store.write(speed, scores, {"label": "minference(vertical=100)"}, density=0.5)
    text = print_table(store.frame())
    assert max(map(len, text.splitlines())) <= 120, text
    assert "books.jsonl" in text and "somewhere" not in text and "1111" not in text
    header = text[text.index("speed, tiny") :].splitlines()[1]
    assert header.split("  ")[-1].strip() == "MiB" and header.index("total ms") < header.index("select") < header.index("x fa2")
    board = leaderboard(store.frame())
    assert {"speed attention speedup_flex 128k", "speed attention of_best_dense 128k"} <= set(board.columns)
    assert not [name for name in board.columns if "inputs" in name]


def test_one_name_for_two_texts_is_told_apart(store):
    for inputs, loss in (("one", 20.0), ("two", 30.0)):
        store.write(dataclasses.replace(DENSE, inputs=inputs), nll({"a": (loss, 10)}), {}, density=1.0)
    assert "inputs" in print_table(store.frame()).splitlines()[1]
    board = leaderboard(store.frame())
    assert board["perplexity pydoc 2k inputs=one"][0] == pytest.approx(math.exp(2))
    assert board["perplexity pydoc 2k inputs=two"][0] == pytest.approx(math.exp(3))


def test_empty_frame(store):
    assert print_table(store.frame()) == "no results yet"
    assert summary(store.frame()).empty and leaderboard(store.frame()).empty


@pytest.mark.parametrize("tokens, name", [(2048, "2k"), (131072, "128k"), (1500, "1500")])
def test_ctx_name(tokens, name):
    assert ctx_name(tokens) == name


def test_notes_stand_below_the_tables_once(store):
    store.write(DENSE, nll({"a": (20.0, 10)}), {"label": "dense", "note": ""}, density=1.0)
    for ctx_len in (2048, 4096):
        cell = dataclasses.replace(SEER, ctx_len=ctx_len)
        store.write(cell, nll({"a": (21.0, 10)}), {"label": "seer", "note": "the nearest is 0.3"}, density=0.3)
    text = print_table(store.frame())
    assert text.count("note: ") == text.count("note: seer: the nearest is 0.3") == 1


def test_rows_that_read_other_texts_are_not_compared(results):
    for method, text in (("dense", "monday"), ("seer", "monday"), ("random", "tuesday")):
        results.add(method, "ruler", "vt", 4096, {"score": [50.0] * 6}, facts={"text_sha256": text})
    table = summary(results.frame()).set_index("method")
    assert table.loc["seer", "diff"] == 0 and pd.isna(table.loc["random", "diff"])


def test_a_note_names_its_rows_where_the_method_has_others(results):
    for task, ctx_len, note in (("vt", 2048, "far"), ("vt", 4096, "far"), ("cwe", 2048, "far"), ("cwe", 4096, "")):
        results.add("seer", "ruler", task, ctx_len, {"score": [50.0] * 6}, facts={"note": note})
        results.add("random", "ruler", task, ctx_len, {"score": [50.0] * 6}, facts={"note": "the floor"})
    said = [line for line in print_table(results.frame()).splitlines() if line.startswith("note: ")]
    assert said == ["note: random: the floor", "note: seer: far (ruler cwe 2k, ruler vt 2k 4k)"]


def test_notes_that_differ_in_numbers_only_are_one(results):
    for ctx_len, note in ((1024, "untuned; the nearest is 0.3"), (2048, "untuned; the nearest is 1.5e-3"), (4096, "untuned")):
        results.add("seer", "ruler", "vt", ctx_len, {"score": [50.0] * 6}, facts={"note": note})
    said = [line for line in print_table(results.frame()).splitlines() if line.startswith("note: ")]
    assert said == ["note: seer: untuned; the nearest is 0.3 (ruler vt 1k; with other numbers in 1 more cells)"]


def test_a_failure_names_its_task_and_target_where_others_went_well(results, store):
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 8192, {"score": [50.0] * 6})
    for target in (0.1, 0.25):
        cell = dataclasses.replace(SEER, suite="ruler", task="vt", ctx_len=8192, density=target)
        store.write(cell, [], {"label": "seer"}, status="failed", reason="out of memory")
    frame = pd.concat([results.frame(), store.frame()], ignore_index=True)
    assert print_table(frame).splitlines()[-1] == "ruler vt 8k failed: out of memory (seer at 0.1, seer at 0.25)"


def test_a_perplexity_table_of_many_columns_fits_a_terminal(store):
    """Intervals of the other metrics go first, then that of the ratio; the mark and the perplexity's own stay."""
    for task, count in (("file:books-parts.jsonl", 12), ("file:proofs-parts.jsonl", 10)):
        for cell, loss in ((DENSE, 3.4), (dataclasses.replace(SEER, density=0.25), 3.5)):
            documents = {str(i): ((loss + i / 9) * 1000, 1000) for i in range(count)}
            rows = [dataclasses.replace(score, task=task) for score in nll(documents) + nll(documents, "_last256")]
            store.write(dataclasses.replace(cell, task=task), rows, {"label": "oracle(threshold=0.001)"}, density=0.12345)
    text = print_table(store.frame())
    assert max(map(len, text.splitlines())) <= 120, text
    assert text.count("worse") == 3 and text.count("[") == 4  # a mark a row and the line about them; an interval a row


def test_rows_of_a_method_stand_in_the_order_of_their_targets(store):
    for target in (0.25, 0.1, 0.5):
        cell = dataclasses.replace(SEER, density=target)
        store.write(cell, nll({"a": (20.0, 10)}), {"label": "seer"}, density=0.5 - target / 10)
    assert summary(store.frame())["density_target"].tolist() == [0.1, 0.25, 0.5]
