"""Plots and the report: they exist, say what the rows say and need no other file."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pandas as pd
import pytest

import sparsebench.results
from sparsebench.results import Store, plots, report
from sparsebench.results.tables import VERSUS
from sparsebench.results.text import print_table
from sparsebench.suites.base import Cell, Score

CELL = Cell(
    model="org/tiny", revision="r", method="dense", params={}, suite="perplexity", task="file:a/b.txt", ctx_len=2048,
    density=None, limit=None, seed=0, dtype="float32",
)  # fmt: skip


def scores(loss: float) -> list[Score]:
    pairs = (("nll", loss), ("tokens", 10.0))
    return [
        Score(CELL.task, name, metric, value * (1 + number), "") for number, name in enumerate("ab") for metric, value in pairs
    ]


@pytest.fixture
def frame(tmp_path):
    with Store(tmp_path / "run") as store:
        store.write(CELL, scores(20), {"label": "dense", "torch": "2.99"}, density=1.0)
        for method, loss in (("oracle", 20.5), ("random", 60.0), ("seer", 21.0)):
            for target in (0.1, 0.2):
                cell = dataclasses.replace(CELL, method=method, density=target)
                store.write(cell, scores(loss), {"note": "gate <b>untrained</b>" if method == "seer" else ""}, density=target)
        for ctx_len, status in ((8192, "skipped"), (4096, "failed")):
            store.write(dataclasses.replace(CELL, ctx_len=ctx_len), [], {}, status=status, reason=f"because of <{status}>")
        return store.frame()


def test_one_plot_per_model_corpus_context_and_settings(frame, tmp_path):
    longer = frame.assign(ctx_len=4096, key=frame["key"] + "x")
    half = frame.assign(dtype="float16", key=frame["key"] + "y")
    paths = plots.quality_plots(plots.pareto(pd.concat([frame, longer, half])), tmp_path)
    assert [path.name for path in paths] == [
        "perplexity-tiny-file-a-b.txt-2k.png", "perplexity-tiny-file-a-b.txt-2k-2.png", "perplexity-tiny-file-a-b.txt-4k.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_plot_styles_and_values(frame, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plots._png(plots.pareto(frame), "density")
    axes = figures[0].axes[0]
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    styles = {name: line.get_linestyle() for name, line in lines.items()}
    assert styles == {"oracle": "--", "random (up to 403)": "--", "seer": "-"}
    assert list(lines["seer"].get_xdata()) == [0.1, 0.2]
    (dense,) = [line for line in axes.lines if line.get_label() == "dense"]
    assert list(dense.get_ydata()) == pytest.approx([7.389056] * 2)
    low, high = axes.get_ylim()
    assert low < 7.389056 < max(lines["seer"].get_ydata()) < high < 10  # random is 50 times worse: not what sets the scale


def test_a_plot_of_very_different_methods_is_logarithmic(frame, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    plots._png(plots.pareto(frame.replace({"method": {"random": "other"}})), "density")
    assert figures[0].axes[0].get_yscale() == "log"


def test_settings_of_a_method_at_equal_density_are_lines_of_their_own(frame, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    twice = pd.concat(
        [frame, frame[frame["method"] == "seer"].assign(prov_label="seer(x=1)", key=frame["key"] + "x", params='{"x":1}')]
    )
    plots._png(plots.pareto(twice), "density")
    labels = {container.get_label() for container in figures[0].axes[0].containers}
    assert labels == {"oracle", "random (up to 403)", "seer", "seer(x=1)"}


def test_report_is_self_contained_and_complete(frame, tmp_path):
    report.write(frame, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html and "@import" not in html
    assert html.count("data:image/png;base64,") == 1
    assert "because of &lt;skipped&gt;" in html and "because of &lt;failed&gt;" in html
    assert "gate &lt;b&gt;untrained&lt;/b&gt;" in html and "<b>" not in html
    assert "2.99" in html and "oracle" in html
    assert len(pd.read_csv(tmp_path / "leaderboard.csv")) == 7
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_leaderboard_holds_the_comparison_that_was_asked_for(frame, tmp_path):
    def columns(versus):
        report.write(frame, tmp_path, versus)
        return set(pd.read_csv(tmp_path / "leaderboard.csv").columns)

    plain, compared = columns(None), columns("oracle")
    assert {name.rpartition(" ")[2] for name in compared - plain} <= set(VERSUS) and compared > plain


@pytest.mark.parametrize("density, far", [(0.2749, False), (0.2751, True), (0.2175, False), (0.2173, True)])
def test_densities_that_are_not_their_targets_are_marked(results, density, far):
    """By the rule of results/leaderboard/README.md, in both kinds of tables and in the report."""
    for task in ("vt", "cwe"):
        results.add("dense", "ruler", task, 4096, {"score": [50.0] * 6})
        results.add("seer", "ruler", task, 4096, {"score": [50.0] * 6}, density, target=0.25)
        results.add("own", "ruler", task, 4096, {"score": [50.0] * 6}, density)
    frame = results.frame()
    text, legend = print_table(frame), "density*: more than 1.1 of its target, or less than 1 / 1.15 of it"
    assert text.count(f"{density}*") == 3 * far and text.splitlines().count(legend) == far
    report.write(frame, results.store.folder)
    html = (results.store.folder / "report.html").read_text()
    assert html.count(f"<td>{density}*</td>") == 3 * far and (f"<p>{legend}.</p>" in html) == far


@pytest.mark.parametrize("count, rough", [(1, False), (2, True), (5, True), (6, False)])
def test_intervals_of_few_documents_are_called_rough(results, count, rough):
    for method in ("dense", "seer"):
        scores = {"nll": [20.0 + i for i in range(count)], "tokens": [10.0] * count}
        results.add(method, "perplexity", "pydoc", 2048, scores, unit="nats")
    frame = results.frame()
    report.write(frame, results.store.folder)
    html = (results.store.folder / "report.html").read_text()
    assert print_table(frame).count("\nn < 6: intervals are rough") == html.count("<p>n &lt; 6: intervals are rough") == rough


def test_empty_report(tmp_path):
    with Store(tmp_path / "run") as store:
        report.write(store.frame(), tmp_path)
    assert "No results yet" in (tmp_path / "report.html").read_text() and not list(tmp_path.glob("*.png"))


def test_this_room_never_imports_torch():
    imported = set()
    for path in Path(sparsebench.results.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert "pandas" in imported and "torch" not in imported
