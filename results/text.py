"""The tables as text, for the terminal and the report, with what was skipped, what failed and what looks wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import pandas as pd
import tabulate

from .statistics import FEWEST, LEVEL
from .tables import ROW, SETTINGS, TIMED, ctx_name, labelled, metric_name, overview, spell, summary, varying

tabulate.MIN_PADDING = 0  # as narrow as their cells: the tables fit 120 columns
WIDTH = 120
LEFT_OUT = ("of matmul", "MiB", "x fa3", "attend", "select", "x flex", "x cudnn", "bwd ms", "x fa2", "TFLOP/s")  # if too wide
LONGEST_REASON = 200  # characters; results.csv has the whole text
NEAR = (1 / 1.15, 1.1)  # of its target: a density that far off is marked
ROUNDING = 1e-3  # a ratio to dense this near to 1 is no advantage
DECIDED = ("worse", "same", "better")
SIGNS = {"better": "+", "same": "=", "worse": "-"}
TIMED_COLUMNS = {  # what the terminal and the report show of the timed suites, in this order
    "ttft_ms": "ttft ms", "ttft_speedup_sdpa": "x sdpa", "total_ms": "total ms", "select_ms": "select", "attend_ms": "attend",
    "speedup_fa2": "x fa2", "ttft_speedup_fa2": "x fa2", "speedup_cudnn": "x cudnn", "ttft_speedup_cudnn": "x cudnn",
    "speedup_fa3": "x fa3", "speedup_fa4": "x fa4", "speedup_flex": "x flex", "speedup_fa4_sparse": "x fa4s",
    "speedup_own_dense": "x own", "tflops": "TFLOP/s", "of_best_dense": "of dense", "of_matmul": "of matmul",
    "backward_ms": "bwd ms", "backward_speedup_fa2": "bwd x fa2", "decode_tokens_per_s": "decode/s",
    "decode_speedup_sdpa": "decode x sdpa", "peak_mb": "MiB",
}  # fmt: skip


def print_table(frame: pd.DataFrame, versus: str | None = None) -> str:
    """The tables of a terminal: per suite and model the means over tasks, then a row per task; below them the legend, the
    notes, what looks wrong, what was skipped or failed. `versus` and its ValueError: see summary()."""
    table, means = summary(frame, versus), overview(frame, versus)
    shown = sections(table, means, versus)
    parts = [f"{title}\n{_text(rows)}" for title, rows in shown]
    below = (legend(shown, table), notes(table), alarms(table, means), problems(frame))
    return "\n\n".join(parts + ["\n".join(lines) for lines in below if lines]) or "no results yet"


def sections(table: pd.DataFrame, means: pd.DataFrame, versus: str | None = None) -> list[tuple[str, pd.DataFrame]]:
    """(title, rows as text) of every table, from summary() and overview()."""
    found = []
    for (suite, model), group in table.groupby(["suite", "model"], sort=True):
        of_suite = means[(means["suite"] == suite) & (means["model"] == model)]
        for _, part in of_suite.groupby("task", sort=True):
            if part["tasks"].max() > 1:
                found += [compact_means(part)] + ([] if versus is None else [compact_means(part, versus)])
        found.append(compact(group, versus))
    return found


def compact_means(group: pd.DataFrame, versus: str | None = None) -> tuple[str, pd.DataFrame]:
    """(title, rows as text) of one suite and model in overview(): a row per method and density target, a column per context
    with the mean and its mark against dense, or with the difference to `versus` and its mark. Where the terminal is wide enough
    with the mean's interval; where even the marks are too wide, with their signs."""
    title = [" ".join(filter(None, group[["suite", "task"]].iloc[0])), group["model"].iloc[0], "means over tasks"]
    title += [] if versus is None else [f"difference to {versus}"]
    most, extra = group["tasks"].max(), _extra(group)
    parts = [part for _, part in group.groupby([*ROW, *SETTINGS], sort=False, dropna=False)]
    for detail in (2, 1, 0):
        table = pd.DataFrame([_means_row(part, extra, detail, versus, most) for part in parts]).fillna("")
        contexts = [name for name in map(ctx_name, sorted(set(group["ctx_len"]) - {0})) if name in table]
        late = [name for name in ("wavg inc", "wavg dec", "effective") if name in table]
        table = table[[name for name in table if name not in (*contexts, *late)] + contexts + late]
        if _width(table) <= WIDTH:
            break
    mark = "mark" if versus is None else "mark_versus"
    signs = [] if detail or not group[mark].isin(DECIDED).any() else [f"+ = - better, same, worse than {versus or 'dense'}"]
    signs += ["* over fewer tasks"] if group.groupby("metric")["tasks"].nunique().max() > 1 else []
    return _titled([*title, *signs], table, ["tasks", "question"], group)


def _means_row(part: pd.DataFrame, extra: list[str], detail: int, versus: str | None, most: int) -> dict[str, str]:
    records = {(record["metric"], record["ctx_len"]): record for record in part.to_dict("records")}
    means = {ctx_len: record for (metric, ctx_len), record in sorted(records.items()) if metric == "mean"}
    first = next(iter(means.values()))
    row = {"method": first["label"]} | {_setting(name): _said(name, first[name]) for name in extra}
    row |= {"tasks": f"{max(r['tasks'] for r in means.values())} of {first['tasks_of']}"}
    far = any(_far(r["density"], r["density_target"]) for r in means.values())
    row |= {"density": _number(pd.Series([r["density"] for r in means.values()]).mean()) + "*" * far}
    shown = {ctx_name(ctx_len): (record, detail) for ctx_len, record in means.items()}
    shown |= {n.replace("_", " "): (records[n, 0], min(detail, 1)) for n in ("wavg_inc", "wavg_dec") if (n, 0) in records}
    for name, (record, fine) in shown.items():
        low, high = (record["low"], record["high"]) if fine == 2 else (None, None)
        value, mark = _with_interval(record["value"], low, high, ".1f"), record["mark"]
        if versus is not None:
            value, mark = _number(record["diff_versus"], "+.1f"), record["mark_versus"]
        fewer = "*" if record["tasks"] < most else ""
        row[name] = f"{value}{fewer} {mark}".strip() if fine else value + fewer + SIGNS.get(mark, "")
    if versus is None and ("effective_length", 0) in records:
        row["effective"] = _effective(records["effective_length", 0]["value"], list(means))
    return row


def _effective(tokens: float, contexts: list[int]) -> str:
    """As RULER's authors write it: "<4k" when even the shortest fails; nothing is known beyond the longest."""
    if not tokens:
        return f"<{ctx_name(contexts[0])}"
    return ">=" * (tokens == contexts[-1]) + ctx_name(int(tokens))


def compact(group: pd.DataFrame, versus: str | None = None) -> tuple[str, pd.DataFrame]:
    """(title with what all rows share, the rows as text) of one suite and model in summary(): a row per cell and
    task, a column per metric, "value [95 % interval]", and for the first metric the ratio (of a %, the difference) to dense
    and the mark, where any row of the table has enough examples for one. Of times that are too wide, columns of LEFT_OUT are
    left out in that order. Of an accuracy's table that is too wide, first the
    interval of the difference is left out, then the parts of the score; of another, first the intervals of all metrics but
    the first, then the interval of the ratio."""
    extra, tasks = _extra(group), _short_tasks(group["task"].unique())
    marked = bool(group["mark"].isin(DECIDED).any())
    cells = [cell for _, cell in group.groupby(["key", "task"], sort=False)]
    for detail in (2, 1, 0):
        rows = []
        for cell in cells:
            first = cell.iloc[0]
            row = {"method": first["label"], "task": tasks[first["task"]], "ctx": ctx_name(first["ctx_len"])}
            row |= {_setting(name): _said(name, first[name]) for name in extra}
            row |= {"density": _number(first["density"]) + "*" * _far(first["density"], first["density_target"])}
            if first["suite"] in TIMED:
                values = dict(zip(cell["metric"], cell["value"]))
                row |= {name: _number(values[metric]) for metric, name in TIMED_COLUMNS.items() if metric in values}
            else:
                row |= _metric_columns(cell, marked, detail, versus) | {"n": str(int(first["n"]))}
            rows.append(row)
        table = pd.DataFrame(rows).fillna("")
        late = [name for name in dict.fromkeys(TIMED_COLUMNS.values()) if name in table]  # the first cell may lack some
        table = table[[name for name in table if name not in late] + late]
        title, table = _titled(list(group[["suite", "model"]].iloc[0]), table, ["task", "question", "n"], group)
        for name in LEFT_OUT:
            if name in table and _width(table) > WIDTH:
                table = table.drop(columns=name)
        if _width(table) <= WIDTH:
            break
    return title, table


def _titled(title: list[str], table: pd.DataFrame, shareable: list[str], group: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What all rows share goes from the table into its title; so do options given to the suite."""
    shared = [name for name in shareable if name in table and table[name].nunique() == 1]
    said = [table[name].iloc[0] if name == "task" else f"{name} = {table[name].iloc[0]}" for name in shared]
    options = [spell(group["options"].iloc[0])] if group["options"].nunique() == 1 else []
    return ", ".join(filter(None, [*title, *said, *options])), table.drop(columns=shared)


def _metric_columns(cell: pd.DataFrame, marked: bool, detail: int, versus: str | None) -> dict[str, str]:
    records = sorted(cell.to_dict("records"), key=lambda record: record["metric"] != "score")
    main = records[0]
    percent = main["unit"] == "%"
    columns = {metric_name(main["metric"], main["suite"]) or main["metric"]: _value(main)}
    if percent and pd.notna(main["diff"]):
        low, high = (main["diff_low"], main["diff_high"]) if detail == 2 else (None, None)
        columns["vs dense"] = "" if pd.isna(main["p_dense"]) else _with_interval(main["diff"], low, high, "+.1f")
    elif not percent and pd.notna(main["vs_dense"]):
        columns["vs dense"] = _with_interval(main["vs_dense"], main["vs_low"] if detail else None, main["vs_high"])
    if marked:
        columns["mark"] = main["mark"]
    if versus is not None and pd.notna(main["diff_versus"]):
        columns[f"vs {versus}"] = f"{main['diff_versus']:{'+.1f' if percent else '+.3g'}} {main['mark_versus']}".strip()
    for record in records[1:]:
        name = metric_name(record["metric"], record["suite"]) or record["metric"]
        if not percent:
            columns[name] = _value(record if detail == 2 else record | {"low": None})
        elif detail:  # the parts of a score, or the same in another scale
            columns[name.removesuffix("_score").removeprefix("score_")] = _value(record | {"low": None})
    return columns


def _value(record: dict[Any, Any]) -> str:
    style = ".1f" if record["unit"] == "%" else ".4g"
    return _with_interval(record["value"], record["low"], record["high"], style)


def _width(table: pd.DataFrame) -> int:
    return max(map(len, _text(table).splitlines()))


def _text(rows: pd.DataFrame) -> str:
    return tabulate.tabulate(rows.to_dict("list"), headers="keys", disable_numparse=True)


def _extra(group: pd.DataFrame) -> list[str]:
    """The columns that tell rows of one method apart."""
    extra = [name for name in ("density_target", *varying(group)) if group[name].notna().any()]
    return extra + (["question"] if (group["question"] != "").any() else [])


def _setting(name: str) -> str:
    return "target" if name == "density_target" else name


def _said(name: str, value: Any) -> str:
    return spell(value) if name == "options" else _number(value)


def _short_tasks(tasks: Iterable[str]) -> dict[str, str]:
    """Of files the name alone where that names one task only: file:some/where/books.jsonl -> books.jsonl."""
    short = {task: task.rsplit("/", 1)[-1].removeprefix("file:") if task.startswith("file:") else task for task in tasks}
    names = list(short.values())
    return {task: name if names.count(name) == 1 else task for task, name in short.items()}


def _far(density: float, target: Any) -> bool:
    return bool(pd.notna(target) and (density < NEAR[0] * target or density > NEAR[1] * target))


def _number(value: Any, style: str = ".4g") -> str:
    if not isinstance(value, float):
        return "" if pd.isna(value) else str(value)
    return "" if pd.isna(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:{style}}"


def _with_interval(value: float, low: float | None, high: float | None, style: str = ".4g") -> str:
    number = _number(value, style)
    return number if pd.isna(low) else f"{number} [{_number(low, style)}, {_number(high, style)}]"


def legend(shown: list[tuple[str, pd.DataFrame]], table: pd.DataFrame) -> list[str]:
    """A line for every sign in the tables `shown`, of sections(), that asks for caution; `table` is of summary()."""
    lines = []
    if any(rows["density"].str.endswith("*").any() for _, rows in shown):
        lines.append(f"density*: more than {NEAR[1]:g} of its target, or less than 1 / {1 / NEAR[0]:g} of it")
    if (table["low"].notna() & (table["n"] < FEWEST)).any():
        rough = (
            "intervals are rough (those of n = 2 hold the truth in half of cases) and none of their differences is significant"
        )
        lines.append(f"n < {FEWEST}: {rough}")
    return lines


def notes(table: pd.DataFrame) -> list[str]:
    """A line for every method: what a reader of its rows must know (an unreached density, an untuned setting), and of which
    rows, where the method has others. Of remarks that differ in their numbers only, the first; the CSVs have all."""
    lines = []
    for label, rows in table.groupby("label", sort=False):
        remarks = rows.assign(remark=rows["note"].str.split("; ")).explode("remark")
        remarks = remarks[remarks["remark"].fillna("") != ""]
        said = []
        for _, alike in remarks.groupby(remarks["remark"].str.replace(r"\d[\d.e+-]*", "#", regex=True), sort=False):
            first = alike[alike["remark"] == alike["remark"].iloc[0]]
            others = alike["key"].nunique() - first["key"].nunique()
            places = [] if first["key"].nunique() == rows["key"].nunique() else [_places(first)]
            places += [f"with other numbers in {others} more cells"] if others else []
            said.append(first["remark"].iloc[0] + (f" ({'; '.join(places)})" if places else ""))
        if said:
            lines.append(f"note: {label}: {'; '.join(said)}")
    return lines


def _places(rows: pd.DataFrame) -> str:
    """ "ruler vt 4k 8k, perplexity pydoc 4k"."""
    lengths: dict[str, set[int]] = {}
    for suite, task, ctx_len in zip(rows["suite"], rows["task"], rows["ctx_len"]):
        lengths.setdefault(f"{suite} {task}", set()).add(ctx_len)
    return ", ".join(" ".join([place, *map(ctx_name, sorted(found))]) for place, found in lengths.items())


def alarms(table: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """A line for every sparse method that beats dense significantly and beyond rounding: a sign of a mistake before it is a
    win. Where examples are too few for a p-value the paired interval decides. The last line says how many comparisons were
    made, and so how many marks chance alone would set. `table` is of summary(), `means` of overview()."""
    table = pd.concat([means[means["tasks"] > 1], table])  # the mean over one task is that task
    table = table[table["metric"].str.startswith("perplexity") | (table["unit"] == "%")]
    lines = []
    for r in table.to_dict("records"):
        less_is_better = r["metric"].startswith("perplexity")
        interval = r["vs_high"] < 1 - ROUNDING if less_is_better else r["vs_low"] > 1 + ROUNDING
        beyond = pd.isna(r["vs_dense"]) or abs(r["vs_dense"] - 1) > ROUNDING
        if beyond if r["mark"] == "better" else interval and r["mark"] not in DECIDED:
            place = " ".join([r["task"] or r["suite"], *([ctx_name(r["ctx_len"])] if r["ctx_len"] else [])])
            size = f"{r['diff']:+.3g}" if pd.isna(r["vs_dense"]) else f"{r['vs_dense']:.4g} of dense"
            chance = f"p = {r['p_dense']:.2g}" if r["mark"] in DECIDED else f"n = {r['n']:.0f} gives no p-value"
            lines.append(f"check: {r['label']} beats dense in {r['metric']}, {place} ({size}), {chance}")
    if made := int(table["mark"].isin(DECIDED).sum()):
        chance = f"at most about {LEVEL * made:.1f} would say worse or better if nothing differed"
        lines.append(f"marks: {made} comparisons with dense at p < {LEVEL}: {chance}")
    return lines


def problems(frame: pd.DataFrame) -> list[str]:
    """A line per suite, context and reason: "perplexity 32k skipped: the model's limit is 8192 tokens (seer, minference)".
    Tasks are named where not all of that suite and context are meant, targets where there are any."""
    planned = frame.groupby(["suite", "ctx_len"])["task"].unique()
    rows = labelled(frame[frame["status"] != "ok"])
    rows = rows.assign(reason=rows["reason"].str.strip().str.split("\n").str[0].fillna(""))
    lines = []
    for _, group in rows.groupby(["status", "suite", "ctx_len", "reason"]):
        first = group.iloc[0]
        tasks = sorted(set(group["task"]))
        named = [] if len(tasks) == len(planned[first["suite"], first["ctx_len"]]) else [", ".join(tasks)]
        place = " ".join([first["suite"], *named, ctx_name(first["ctx_len"])])
        targets = group["density_target"].map(lambda target: "" if pd.isna(target) else f" at {target:g}")
        methods = ", ".join(sorted(set(group["label"] + targets)))
        reason = textwrap.shorten(first["reason"], LONGEST_REASON, placeholder=" ...")
        lines.append(f"{place} {first['status']}: {reason} ({methods})")
    return lines
