"""From stored rows to what people read: aggregates with their uncertainty, ratios to dense, the leaderboard.

Nothing computed here is stored with the cells. Every function is pure; `frame` is Store.frame().
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 2000
DENSE_KERNELS = ("fa2", "cudnn", "fa3", "fa4")  # metrics {name}_ms of the speed suite that are dense attention
BASELINES = (*DENSE_KERNELS, "flex")
ROW = ["model", "revision", "method", "params", "density_target"]  # what makes a row of the leaderboard
TEXT = ["label", "note"]  # what is said about it
SETTINGS = ["limit", "seed", "dtype", "device", "inputs"]  # named in a column only where a suite was run with several
PLACE = ["suite", "task", "ctx_len"]
STATS = ["n", "se", "low", "high", "vs_dense", "vs_low", "vs_high"]
DENSITY = ["density", "density_min", "density_max"]
PROVENANCE = ["gpu", "driver", "cpu", "torch", "triton", "transformers", "kernel", "knob", "calibrated_on"]
PROVENANCE += ["git_commit", "git_dirty", "source_sha256"]
SUMMARY = ["key", *ROW, *TEXT, *SETTINGS, *PLACE, "metric", "unit", "value", *STATS, *DENSITY]


@dataclass
class Ratio:
    """sum(num) / sum(den) over independent units (documents or examples), or its exponential."""

    units: list[str]
    num: np.ndarray  # [n]
    den: np.ndarray  # [n]
    exponential: bool = False

    @property
    def value(self) -> float:
        return float(self._of(np.ones(len(self.units))))

    @property
    def se(self) -> float:
        """Standard error by linearisation; for equal denominators that is the standard error of a mean."""
        n, total = len(self.units), self.den.sum()
        if n < 2:
            return float("nan")
        residual = self.num - self.num.sum() / total * self.den
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / total * (self.value if self.exponential else 1))

    def resampled(self) -> np.ndarray:
        """[RESAMPLES] bootstrap values. Equal n means equal draws, which pairs two Ratios over the same units."""
        return self._of(_draws(len(self.units)))

    def _of(self, weights: np.ndarray) -> np.ndarray:
        ratio = weights @ self.num / (weights @ self.den)
        return np.exp(ratio) if self.exponential else ratio


@lru_cache(maxsize=8)
def _draws(n: int) -> np.ndarray:
    """[RESAMPLES, n] how often each unit is drawn; always the same for one n."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per finished cell, task and metric: columns SUMMARY.

    perplexity = exp(total nll / total tokens); every other metric is a mean. `se` and the 95 % interval `low`, `high`
    (bootstrap over documents or examples) are blank for n = 1. `vs_dense` is the ratio to the dense method of the same model,
    examples and settings with a paired interval. For `speed`, speedup_NAME = NAME's time / the method's total time, and
    of_best_dense = the useful FLOP rate / that of the fastest dense kernel.
    """
    rows = [row for _, cell in _finished(frame).groupby(["key", "task"], sort=False) for row in _cell_rows(cell)]
    dense = {_place(row): row["ratio"] for row in rows if row["method"] == "dense"}
    for row in rows:
        ratio, reference = row.pop("ratio"), dense.get(_place(row))
        if ratio is not None and row["suite"] not in ("speed", "fidelity") and reference is not None:
            row |= _versus(ratio, reference)
    table = pd.DataFrame(rows).reindex(columns=SUMMARY)
    order = table.assign(sparse=table["method"] != "dense")
    return table.loc[
        order.sort_values(["suite", "model", "task", "ctx_len", "sparse", "label", "density"], kind="stable").index
    ]


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    frame = labelled(frame)
    return frame[frame["status"] == "ok"]


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the columns `label` and `note` of its provenance; without a label the method with all its params."""
    label = frame.get("prov_label", pd.Series(index=frame.index, dtype=object))
    spelt = [
        f"{m}({','.join(f'{k}={v}' for k, v in json.loads(p or '{}').items())})" for m, p in zip(frame.method, frame.params)
    ]
    spelt = [name.removesuffix("()") for name in spelt]
    note = frame.get("prov_note", pd.Series(index=frame.index, dtype=object))
    return frame.assign(label=label.where(label.notna(), pd.Series(spelt, frame.index, dtype=object)), note=note.fillna(""))


def _place(row: dict[str, Any]) -> tuple:
    """What two rows must share to be compared."""
    return tuple(str(row[c]) for c in ["model", "revision", *SETTINGS, *PLACE, "metric"])


def _cell_rows(cell: pd.DataFrame) -> Iterator[dict[str, Any]]:
    first = cell.iloc[0]
    common = {name: first[name] for name in ["key", *ROW, *TEXT, *SETTINGS, *PLACE, *DENSITY]}
    measured = cell.loc[cell["metric"] == "density", "value"]  # per layer and head, where the suite measures it itself
    if len(measured) and pd.isna(first["density"]):
        common |= dict(zip(DENSITY, (measured.mean(), measured.min(), measured.max())))
    values = {}
    for metric, unit, ratio in _ratios(cell):
        interval = _interval(ratio.resampled()) if len(ratio.units) > 1 else {}
        values[metric] = ratio.value
        uncertainty = {"n": len(ratio.units), "se": ratio.se, **interval}
        yield common | {"metric": metric, "unit": unit, "value": ratio.value, "ratio": ratio} | uncertainty
    if first["suite"] == "speed" and "total_ms" in values:
        total = values["total_ms"]
        derived = {f"speedup_{b}": values[f"{b}_ms"] / total for b in BASELINES if f"{b}_ms" in values}
        dense = [values[f"{b}_ms"] for b in DENSE_KERNELS if f"{b}_ms" in values]
        if dense and pd.notna(common["density"]):
            derived["of_best_dense"] = common["density"] * min(dense) / total
        for metric, value in derived.items():
            yield common | {"metric": metric, "unit": "ratio", "value": value, "n": 1, "ratio": None}


def _ratios(cell: pd.DataFrame) -> Iterator[tuple[str, str, Ratio]]:
    """(metric, unit, Ratio) for every metric of one cell; a pair nll*, tokens* becomes perplexity*."""
    parts = {str(metric): rows.set_index("example")["value"] for metric, rows in cell.groupby("metric", sort=False)}
    for metric, values in parts.items():
        if metric == "density" or (metric.startswith("tokens") and metric.replace("tokens", "nll", 1) in parts):
            continue
        tokens = parts.get(metric.replace("nll", "tokens", 1)) if metric.startswith("nll") else None
        if tokens is not None:
            units = [str(example) for example in values.index]
            yield metric.replace("nll", "perplexity", 1), "", Ratio(units, values.to_numpy(), tokens[units].to_numpy(), True)
        else:
            unit = str(cell.loc[cell["metric"] == metric, "unit"].iloc[0])
            # An example of the fidelity suite is "document/layer/head": only documents are independent of one another.
            names = values.index.str.rsplit("/", n=2).str[0] if cell["suite"].iloc[0] == "fidelity" else values.index
            sums = values.groupby(names, sort=False).agg(["sum", "count"])
            yield metric, unit, Ratio(list(sums.index), sums["sum"].to_numpy(), sums["count"].to_numpy(float))


def _versus(ratio: Ratio, dense: Ratio) -> dict[str, float]:
    """Ratio to dense, paired by unit; nothing where the two saw different units or dense is 0."""
    if ratio is dense:
        return {"vs_dense": 1.0}
    if sorted(ratio.units) != sorted(dense.units) or dense.value == 0:
        return {}
    order = [dense.units.index(unit) for unit in ratio.units]
    paired = Ratio(ratio.units, dense.num[order], dense.den[order], dense.exponential)
    resampled = paired.resampled()
    interval = _interval(ratio.resampled() / resampled) if len(order) > 1 and (resampled != 0).all() else {}
    return {"vs_dense": ratio.value / dense.value} | {f"vs_{name}": value for name, value in interval.items()}


def ctx_name(tokens: int) -> str:
    """8192 -> "8k"."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def varying(table: pd.DataFrame) -> list[str]:
    """The settings that a reader must be told. Of `inputs` that is so only where two texts have one name."""
    several = [name for name in SETTINGS if table[name].nunique(dropna=False) > 1]
    return [name for name in several if name != "inputs" or table.groupby("task")[name].nunique().max() > 1]


def metric_name(metric: str, suite: str) -> str:
    """ "" for the suite's own metric, "last256" for "perplexity_last256"."""
    return "" if metric == suite else metric.removeprefix(f"{suite}_")


def leaderboard(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per model x method x params (x density target); columns "suite task metric ctx" (the metric is left out where it
    is the suite's name: "perplexity pydoc 2k"), each followed by its n, se, 95 % interval and ratio to dense, then the measured
    density; last, what the row was measured on. Settings that differ within a suite are spelt in the column's name, so
    different measurements never mix."""
    rows: dict[tuple, dict[str, Any]] = {}
    keys: dict[tuple, set[str]] = {}
    for suite, table in summary(frame).groupby("suite", sort=True):
        settings_named = varying(table)
        stats = STATS if suite != "speed" else []
        for record in table.to_dict("records"):
            identity = tuple(None if pd.isna(record[name]) else record[name] for name in ROW)
            keys.setdefault(identity, set()).add(record["key"])
            row = rows.setdefault(identity, dict(zip(ROW, identity)) | dict.fromkeys(TEXT, ""))
            row |= {
                name: row[name] if record[name] in row[name] else f"{row[name]}; {record[name]}".strip("; ") for name in TEXT
            }
            metric = metric_name(record["metric"], str(suite))
            settings = [f"{name}={record[name]}" for name in settings_named]
            place = [str(suite), record["task"], ctx_name(record["ctx_len"]), *settings]
            column = " ".join(filter(None, [*place[:2], metric, *place[2:]]))
            row[column] = record["value"]
            row |= {f"{column} {stat}": record[stat] for stat in stats}
            row |= {" ".join([*place, name]): record[name] for name in DENSITY}
    for name in (name for name in PROVENANCE if f"prov_{name}" in frame):
        values = frame.drop_duplicates("key").set_index("key")[f"prov_{name}"].dropna().astype(str)
        for identity, row in rows.items():
            row[name] = "; ".join(sorted(set(values[values.index.isin(keys[identity])]))) or None
    board = pd.DataFrame(list(rows.values()))
    lead = [*ROW[:3], *TEXT, *ROW[3:]]
    filled = [name for name in board.columns if name not in lead and board[name].notna().any()]
    board = board.reindex(columns=[*lead, *sorted(filled, key=lambda name: name in PROVENANCE)])
    order = board.assign(sparse=board["method"] != "dense")
    return board.loc[order.sort_values(["model", "sparse", "label", "density_target"]).index].reset_index(drop=True)
