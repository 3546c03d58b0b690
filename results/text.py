"""The tables as text, for the terminal and the report, with what was skipped, what failed and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import tabulate

from .tables import ctx_name, labelled, metric_name, summary, varying

tabulate.MIN_PADDING = 0  # as narrow as their cells: the tables fit 120 columns
ROUNDING = 1e-3  # a ratio to dense this near to 1 is no advantage
SPEED_COLUMNS = {  # what the terminal and the report show of the speed suite, in this order
    "total_ms": "total ms", "select_ms": "select", "attend_ms": "attend", "speedup_fa2": "x fa2", "speedup_cudnn": "x cudnn",
    "speedup_fa3": "x fa3", "speedup_fa4": "x fa4", "speedup_flex": "x flex", "tflops": "TFLOP/s", "of_best_dense": "of dense",
    "peak_mb": "MiB",
}  # fmt: skip


def print_table(frame: pd.DataFrame) -> str:
    """The tables of a terminal: one per suite and model; below them the notes, what looks wrong, what was skipped or failed."""
    table = summary(frame)
    parts = []
    for _, group in table.groupby(["suite", "model"], sort=True):
        title, rows = compact(group)
        parts.append(f"{title}\n" + tabulate.tabulate(rows.to_dict("list"), headers="keys", disable_numparse=True))
    return (
        "\n\n".join(parts + ["\n".join(lines) for lines in (notes(table), alarms(table), problems(frame)) if lines])
        or "no results yet"
    )


def compact(group: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(title with what all rows share, the rows as text) of one suite and model in summary(): a row per cell and
    task, a column per metric, "value [95 % interval]", and the ratio to dense of the first metric."""
    extra = [name for name in ("density_target", *varying(group)) if group[name].notna().any()]
    tasks = _short_tasks(group["task"].unique())
    rows = []
    for _, cell in group.groupby(["key", "task"], sort=False):
        first = cell.iloc[0]
        row = {"method": first["label"], "task": tasks[first["task"]], "ctx": ctx_name(first["ctx_len"])}
        row |= {name.replace("density_target", "target"): _number(first[name]) for name in extra}
        row["density"] = _number(first["density"])
        if first["suite"] == "speed":
            values = dict(zip(cell["metric"], cell["value"]))
            row |= {name: _number(values[metric]) for metric, name in SPEED_COLUMNS.items() if metric in values}
        else:
            row |= _metric_columns(cell) | {"n": str(int(first["n"]))}
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    late = [name for name in SPEED_COLUMNS.values() if name in table]  # the first cell may lack what later ones have
    table = table[[name for name in table if name not in late] + late]
    shared = [name for name in ("task", "n") if name in table and table[name].nunique() == 1]
    said = [table[name].iloc[0] if name == "task" else f"{name} = {table[name].iloc[0]}" for name in shared]
    return ", ".join([*group[["suite", "model"]].iloc[0], *said]), table.drop(columns=shared)


def _metric_columns(cell: pd.DataFrame) -> dict[str, str]:
    columns = {}
    for record in cell.to_dict("records"):
        name = metric_name(record["metric"], record["suite"]) or record["metric"]
        columns[name] = _with_interval(record["value"], record["low"], record["high"])
        if pd.notna(record["vs_dense"]) and "vs dense" not in columns:
            columns["vs dense"] = _with_interval(record["vs_dense"], record["vs_low"], record["vs_high"])
    return columns


def _short_tasks(tasks: Iterable[str]) -> dict[str, str]:
    """Of files the name alone where that names one task only: file:some/where/books.jsonl -> books.jsonl."""
    short = {task: task.rsplit("/", 1)[-1].removeprefix("file:") if task.startswith("file:") else task for task in tasks}
    names = list(short.values())
    return {task: name if names.count(name) == 1 else task for task, name in short.items()}


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return "" if pd.isna(value) else str(value)
    return "" if pd.isna(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _with_interval(value: float, low: float, high: float) -> str:
    return _number(value) if pd.isna(low) else f"{_number(value)} [{_number(low)}, {_number(high)}]"


def notes(table: pd.DataFrame) -> list[str]:
    """A line for every method and note: what a reader of its rows must know (an unreached density, an untuned setting)."""
    said = table[table["note"] != ""].drop_duplicates(["label", "note"])
    return [f"note: {label}: {note}" for label, note in zip(said["label"], said["note"])]


def alarms(table: pd.DataFrame) -> list[str]:
    """A line for every sparse method that beats dense beyond its 95 % interval: a sign of a mistake before it is a win."""
    better = [
        r["vs_high"] < 1 - ROUNDING
        if str(r["metric"]).startswith("perplexity")
        else r["unit"] == "%" and r["vs_low"] > 1 + ROUNDING
        for r in table.to_dict("records")
    ]
    return [
        f"check: {r['label']} beats dense in {r['metric']}, {r['task']} {ctx_name(r['ctx_len'])} ({r['vs_dense']:.4g} of dense)"
        for r in table[better].to_dict("records")
    ]


def problems(frame: pd.DataFrame) -> list[str]:
    """A line per suite, context and reason: "perplexity 32k skipped: the model's limit is 8192 tokens (seer, minference)"."""
    rows = labelled(frame[frame["status"] != "ok"])
    rows = rows.assign(reason=rows["reason"].str.strip().str.split("\n").str[0].fillna(""))
    lines = []
    for _, group in rows.groupby(["status", "suite", "ctx_len", "reason"]):
        first = group.iloc[0]
        methods = ", ".join(sorted(set(group["label"])))
        lines.append(f"{first['suite']} {ctx_name(first['ctx_len'])} {first['status']}: {first['reason']} ({methods})")
    return lines
