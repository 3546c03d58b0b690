"""From stored rows to what people read: aggregates with their uncertainty, comparisons with dense, the leaderboard.

Nothing computed here is stored with the cells. Every function is pure; `frame` is Store.frame().
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from .statistics import FEWEST, LEVEL, Mixture, Ratio, compare, interval

DENSE_KERNELS = ("fa2", "cudnn", "fa3", "fa4")  # metrics {name}_ms of the speed suite that are dense attention
BASELINES = (*DENSE_KERNELS, "flex", "fa4_sparse", "own_dense", "sdpa")
TIMED = ("speed", "latency")  # suites of times and sizes: percentiles, no intervals, no comparison with dense as a method
TASKS = {"ruler": 13, "longbench": 21, "longbench e": 13, "longbench2": 1}  # suites whose tasks are averaged: how many
EFFECTIVE = 85.6  # %, of Llama-2-7b-chat at 4k tokens: RULER's threshold (Hsieh et al. 2024, arXiv 2404.06654, section 4)
ROW = ["model", "revision", "method", "params", "density_target"]  # what makes a row of the leaderboard
TEXT = ["label", "note"]  # what is said about it
SETTINGS = ["limit", "seed", "dtype", "device", "options", "inputs"]  # in a column's name only where there are several
PLACE = ["suite", "task", "ctx_len"]
STATS = ["n", "se", "low", "high", "vs_dense", "vs_low", "vs_high", "diff", "diff_low", "diff_high", "p_dense", "mark"]
VERSUS = ["diff_versus", "p_versus", "mark_versus"]
DENSE_NAMES = {"ratio": "vs_dense", "ratio_low": "vs_low", "ratio_high": "vs_high", "p": "p_dense", "mark": "mark"}
DENSE_NAMES |= {name: name for name in ("diff", "diff_low", "diff_high")}  # what compare() gives -> the columns of STATS
VERSUS_NAMES = {"diff": "diff_versus", "p": "p_versus", "mark": "mark_versus"}
DENSITY = ["density", "density_min", "density_max"]
PROVENANCE = ["gpu", "driver", "cpu", "torch", "triton", "transformers", "kernel", "knob", "calibrated_on"]
PROVENANCE += ["question", "dense_phases", "chat_template", "git_commit", "git_dirty", "source_sha256"]
KNOWN = ["key", *ROW, *TEXT, "question", *SETTINGS, *PLACE]
SUMMARY = [*KNOWN, "metric", "unit", "value", *STATS, *DENSITY]
OVERVIEW = [*KNOWN[1:], "metric", "unit", "value", "tasks", "tasks_of", *STATS, *DENSITY]


def summary(frame: pd.DataFrame, versus: str | None = None) -> pd.DataFrame:
    """A row per finished cell, task and metric: columns SUMMARY.

    perplexity = exp(total nll / total tokens); every other metric is a mean. `se` and the 95 % interval `low`, `high`
    (bootstrap over documents or examples) are blank for n = 1 and for times. Against the dense method of the same model,
    examples and settings: vs_dense is the ratio, diff the difference, both with paired intervals, p_dense the p-value of the
    paired sign-flip test and `mark` says "worse", "better" (p < 0.05) or "same" (no difference shown); with fewer than 6
    examples no p can be that small, and the mark is "n<6". Fidelity is measured against dense and has no such columns.
    For `speed`, speedup_NAME = NAME's time / the method's total time, of_best_dense = the useful FLOP rate / that of the
    fastest dense kernel, of_matmul = the same / that of a matrix product; attend_* the same of the method's attention alone,
    backward_* of the gradients. For `latency`, ttft_speedup_NAME and decode_speedup_NAME against the dense model with kernel
    NAME.

    versus: a label or the name of a method; its row of the same density target is compared with in VERSUS columns, the
    difference in the metric's unit. A label that fits goes before a name; of several methods of that name the first by label
    and params is taken. Raises: ValueError when no finished row has that label or name.
    """
    rows = list(_records(frame))
    known = {row["label"] for row in rows} | {row["method"] for row in rows}
    if versus is not None and rows and versus not in known:
        raise ValueError(f"no finished results of {versus!r} to compare with; there are {', '.join(sorted(known))}")
    table = _table(rows, SUMMARY, versus)
    order = table.assign(sparse=table["method"] != "dense")
    by = ["suite", "model", "task", "ctx_len", "sparse", "label", "density_target", "density"]
    return table.loc[order.sort_values(by, kind="stable").index]


def overview(frame: pd.DataFrame, versus: str | None = None) -> pd.DataFrame:
    """The suites of many tasks (TASKS) in a few numbers a method: columns OVERVIEW, task "" (LongBench-E: "e").

    `mean` (of metric score; mean_0_4k of score_0_4k) is the plain mean over the tasks at one context, resampled and tested
    within tasks. For RULER, over all lengths and with ctx_len 0, as NVIDIA/RULER's README gives them: wavg_inc and wavg_dec,
    the means weighted 1, 2, 3 ... by rank of length, from the shortest and from the longest on; effective_length in tokens, the
    longest with a mean above 85.6 %, 0 when there is none. These three are left out when not every length has the same tasks.
    `tasks` of `tasks_of` were run. Comparisons as in summary(), between equal tasks only.
    """
    records = [row for row in _records(frame) if row["suite"] in TASKS and row["metric"].startswith("score")]
    texts: dict[tuple, set[str]] = {}
    for row in records:
        texts.setdefault((_measured(row), row["ctx_len"], row["task"]), set()).add(row["inputs"])
    # Tasks may differ in the texts they read, one task may not: then the texts are measurements of their own.
    mixed = {measured for (measured, *_), inputs in texts.items() if len(inputs) > 1}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in records:
        inputs = row["inputs"] if _measured(row) in mixed else ""
        identity = tuple(str(row[name]) for name in [*ROW, "metric"])
        groups.setdefault((_measured(row), identity, inputs), []).append(row)
    table = _table([row for (*_, inputs), group in groups.items() for row in _means(group, inputs)], OVERVIEW, versus)
    order = table.assign(sparse=table["method"] != "dense", last=table["ctx_len"] == 0)
    by = ["suite", "model", "task", "sparse", "label", "density_target", "metric", "last", "ctx_len"]
    return table.loc[order.sort_values(by, kind="stable").index]


def _measured(row: dict[str, Any]) -> tuple[str, ...]:
    """What the tasks of one mean share, the texts aside."""
    return (*(str(row[name]) for name in ["model", "revision", *SETTINGS, "suite"] if name != "inputs"), _part(row))


def _part(row: dict[str, Any]) -> str:
    return "e" if row["suite"] == "longbench" and row["task"].endswith("_e") else ""


def _means(records: list[dict[str, Any]], inputs: str) -> Iterator[dict[str, Any]]:
    """The overview's rows of one method and metric; `records` are distinct in context and task."""
    suite, part, metric = records[0]["suite"], _part(records[0]), records[0]["metric"].replace("score", "mean", 1)
    lengths: dict[int, dict[str, dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["ctx_len"], r["task"])):
        lengths.setdefault(record["ctx_len"], {})[record["task"]] = record
    common = records[0] | {"task": part, "inputs": inputs, "tasks_of": TASKS[f"{suite} {part}".strip()]}
    common["question"] = ", ".join(sorted({record["question"] for record in records}))

    def row(metric: str, ctx_len: int, ranks: dict[int, int]) -> dict[str, Any]:
        used = {f"{length}/{task}": (length, record) for length in ranks for task, record in lengths[length].items()}
        weights = {name: ranks[length] / sum(ranks.values()) / len(lengths[length]) for name, (length, _) in used.items()}
        mean = Mixture({name: record["ratio"] for name, (_, record) in used.items()}, weights)
        mid, low, high = ([record[name] for _, record in used.values()] for name in DENSITY)
        densities = dict(zip(DENSITY, (np.mean(mid), np.min(low), np.max(high))))
        tasks = {"tasks": len({record["task"] for _, record in used.values()})}
        return common | {"ctx_len": ctx_len, "metric": metric, "ratio": mean} | densities | tasks

    means = [row(metric, length, {length: 1}) for length in lengths]
    yield from means
    if (suite, metric) != ("ruler", "mean") or len({tuple(tasks) for tasks in lengths.values()}) > 1:
        return
    rank = {length: number for number, length in enumerate(lengths, 1)}
    if len(rank) > 1:
        yield row("wavg_inc", 0, rank)
        yield row("wavg_dec", 0, {length: len(rank) + 1 - number for length, number in rank.items()})
    longest = max((mean["ctx_len"] for mean in means if mean["ratio"].value > EFFECTIVE), default=0)
    yield row("effective_length", 0, rank) | {"ratio": None, "unit": "tokens", "value": longest}


def newest(frame: pd.DataFrame, run: set[tuple[str, str, str]]) -> pd.DataFrame:
    """`frame` (Store.frame()) without the rows of earlier versions of the methods in `run`, (model, label, params) each: with
    the same label, but of a plug-in, gate or settings file that has changed since. No table can tell the two apart. Says so."""
    if "prov_label" not in frame:
        return frame
    named = {(model, label) for model, label, _ in run}
    rows = zip(frame["model"], frame["prov_label"], frame["params"])
    stale = pd.Series([row[:2] in named and row not in run for row in rows], frame.index, dtype=bool)
    if stale.any():
        names = ", ".join(sorted(frame["prov_label"][stale].unique()))
        print(f"rows of earlier versions of {names} are in results.csv alone")
    return frame[~stale]


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns `label`, `note` and `question` (where there are answers) of its provenance and with `options`;
    without a label the method with all its params. `inputs` becomes the digest of the text that was read, where the suite kept
    one: a data set or a chat template may change under the same name."""
    names = (*TEXT, "question", "text_sha256")
    texts = {name: frame.get(f"prov_{name}", pd.Series(index=frame.index, dtype=object)) for name in names}
    pairs = pd.Series(list(zip(frame["method"], frame["params"])), frame.index, dtype=object)
    spelt = pairs.map({pair: f"{pair[0]}({spell(pair[1])})".removesuffix("()") for pair in pairs.unique()})
    options = frame["options"] if "options" in frame else pd.Series("{}", frame.index, dtype=object)
    return frame.assign(
        label=texts["label"].where(texts["label"].notna(), spelt.astype(object)),
        note=texts["note"].fillna(""),
        question=texts["question"].where(frame["suite"].isin(TASKS), "").fillna(""),
        inputs=texts["text_sha256"].where(texts["text_sha256"].notna(), frame["inputs"]),
        options=options.fillna("").replace("", "{}"),
    )


def spell(settings: str) -> str:
    """{"a":1,"b":2} -> "a=1,b=2"."""
    return ",".join(f"{name}={value}" for name, value in json.loads(settings or "{}").items())


def _records(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What is known of every finished cell, task and metric: KNOWN, DENSITY, metric, unit and its `ratio`; a derived one (a
    speed-up) has a `value` and the ratio None."""
    frame = labelled(frame)
    frame = frame[frame["status"] == "ok"]
    groups = sorted(frame.groupby(["key", "task"], sort=False).indices.values(), key=lambda index: index[0])
    columns = [*KNOWN, *DENSITY]
    heads = frame.iloc[[int(index[0]) for index in groups]][columns].itertuples(index=False, name=None)
    metrics, examples, values, units = (frame[name].to_list() for name in ("metric", "example", "value", "unit"))
    for index, head in zip(groups, heads):
        common = dict(zip(columns, head))
        parts: dict[str, dict[str, float]] = {}
        unit: dict[str, str] = {}
        for i in index:
            parts.setdefault(metrics[i], {})[examples[i]] = values[i]
            unit[metrics[i]] = units[i]
        measured = list(parts.pop("density", {}).values())  # per layer and head, where the suite measures it itself
        if measured and pd.isna(common["density"]):
            common |= dict(zip(DENSITY, (np.mean(measured), min(measured), max(measured))))
        ratios = dict(_ratios(parts, fidelity=common["suite"] == "fidelity"))
        for metric, ratio in ratios.items():
            yield common | {"metric": metric, "unit": unit.get(metric, ""), "ratio": ratio}
        for metric, value in _derived(common, {metric: ratio.value for metric, ratio in ratios.items()}).items():
            yield common | {"metric": metric, "unit": "ratio", "ratio": None, "value": value, "n": 1}


def _ratios(parts: dict[str, dict[str, float]], fidelity: bool) -> Iterator[tuple[str, Ratio]]:
    """(metric, Ratio) for every metric {example: value} of one cell; a pair nll*, tokens* becomes perplexity*."""
    for metric, values in parts.items():
        if metric.startswith("tokens") and metric.replace("tokens", "nll", 1) in parts:
            continue
        tokens = parts.get(metric.replace("nll", "tokens", 1)) if metric.startswith("nll") else None
        if tokens is not None:
            den = np.array([tokens[example] for example in values], float)
            yield metric.replace("nll", "perplexity", 1), Ratio(list(values), np.array(list(values.values())), den, True)
        else:
            sums: dict[str, list[float]] = {}
            for example, value in values.items():
                # An example of the fidelity suite is "document/layer/head": only documents are independent of one another.
                sums.setdefault(example.rsplit("/", 2)[0] if fidelity else example, []).append(value)
            num, den = (np.array([f(v) for v in sums.values()], float) for f in (sum, len))
            yield metric, Ratio(list(sums), num, den)


def _derived(common: dict[str, Any], values: dict[str, float]) -> dict[str, float]:
    """Speed-ups and the like of one cell of the timed suites."""
    found: dict[str, float] = {}
    if common["suite"] == "speed":
        for time, part, kind in (("total_ms", "", ""), ("attend_ms", "attend_", ""), ("backward_ms", "backward_", "_backward")):
            if time in values:
                others = {name: values[f"{name}{kind}_ms"] for name in BASELINES if f"{name}{kind}_ms" in values}
                found |= {f"{part}speedup_{name}": other / values[time] for name, other in others.items()}
                dense = [other for name, other in others.items() if name in DENSE_KERNELS]
                if dense and pd.notna(common["density"]):
                    found[f"{part}of_best_dense"] = common["density"] * min(dense) / values[time]
                if {f"{part}tflops", "matmul_tflops"} <= values.keys():
                    found[f"{part}of_matmul"] = values[f"{part}tflops"] / values["matmul_tflops"]
    if common["suite"] == "latency":
        for name in BASELINES:
            time, rate = f"ttft_{name}_ms", f"decode_{name}_tokens_per_s"
            if {"ttft_ms", time} <= values.keys():
                found[f"ttft_speedup_{name}"] = values[time] / values["ttft_ms"]
            if {"decode_tokens_per_s", rate} <= values.keys():
                found[f"decode_speedup_{name}"] = values["decode_tokens_per_s"] / values[rate]
    return found


def _table(rows: list[dict[str, Any]], columns: list[str], versus: str | None) -> pd.DataFrame:
    """`rows` with what their `ratio` says: value, uncertainty and comparisons."""
    dense = {_place(row): row["ratio"] for row in rows if row["method"] == "dense"}
    chosen = [row for row in rows if versus in (row["label"], row["method"])]
    others: dict[tuple, Ratio | Mixture] = {}
    for row in sorted(chosen, key=lambda row: (row["label"] != versus, row["label"], row["params"])):
        others.setdefault((_target(row), *_place(row)), row["ratio"])
    filled = []
    for row in rows:
        ratio, place = row["ratio"], _place(row)
        if ratio is not None:
            row = row | {"value": ratio.value, "n": len(ratio.units)}
        if ratio is not None and row["suite"] not in TIMED:
            row["se"] = ratio.se
            row["low"], row["high"] = interval(ratio.resampled) if pd.notna(ratio.se) else (None, None)
            if row["suite"] != "fidelity":
                row |= _against(row, ratio, dense.get(place), DENSE_NAMES)
            # Dense has no density target: with it, every row is compared.
            row |= _against(row, ratio, others.get((_target(row), *place), others.get(("dense", *place))), VERSUS_NAMES)
        filled.append(row)
    table = pd.DataFrame(filled).reindex(columns=[*columns, *([] if versus is None else VERSUS)])
    if table.empty:
        return table.astype(object)
    marks = [name for name in ("mark", "mark_versus") if name in table]
    table[marks] = table[marks].astype(object).fillna("")
    return table


def _against(row: dict[str, Any], ratio: Any, other: Any, names: dict[str, str]) -> dict[str, Any]:
    """The columns of one comparison; a row beside itself has neither p nor mark."""
    found: dict[str, Any] = compare(ratio, other) if other is not None else {}
    if found and ratio is not other:
        found["mark"] = verdict(row["metric"], row["n"], found["diff"], found["p"])
    elif found:
        found = {"ratio": 1.0, "diff": 0.0}
    return {names[name]: value for name, value in found.items() if name in names}


def verdict(metric: str, n: int, diff: float, p: float) -> str:
    """ "better", "worse", "same" or "n<6", see summary()."""
    if n < FEWEST:
        return f"n<{FEWEST}"
    less_is_better = metric.startswith(("perplexity", "nll", "error"))
    return "same" if p >= LEVEL else "better" if (diff < 0) == less_is_better else "worse"


def _place(row: dict[str, Any]) -> tuple[str, ...]:
    """What two rows must share to be compared."""
    return tuple(str(row[c]) for c in ["model", "revision", *SETTINGS, *PLACE, "metric"])


def _target(row: dict[str, Any]) -> str:
    return "dense" if row["method"] == "dense" else str(row["density_target"])


def ctx_name(tokens: int) -> str:
    """8192 -> "8k"."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def varying(table: pd.DataFrame) -> list[str]:
    """The settings that a reader must be told. Of `inputs` that is so only where two texts have one name."""
    several = [name for name in SETTINGS if table[name].nunique(dropna=False) > 1]
    return [name for name in several if name != "inputs" or table.groupby(["task", "ctx_len"])[name].nunique().max() > 1]


def metric_name(metric: str, suite: str) -> str:
    """ "" for the suite's own metric, "last256" for "perplexity_last256"."""
    return "" if metric == suite else metric.removeprefix(f"{suite}_")
