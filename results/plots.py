"""Pictures of the results: perplexity against the density that was measured."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .store import write_atomically
from .tables import SETTINGS, ctx_name, summary

FRAMING = ("oracle", "random")  # the ceiling and the floor of any selection


def perplexity_plots(frame: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write a PNG per model, corpus, context and settings into `folder` and return their paths.

    Bars are 95 % intervals of the paired ratio to dense, scaled to dense's perplexity.
    """
    table = summary(frame)
    table = table[table["metric"] == "perplexity"]
    paths: list[Path] = []
    for _, group in table.groupby(["model", "revision", "task", "ctx_len", *SETTINGS], dropna=False, sort=True):
        first = group.iloc[0]
        name = f"{first['model'].rstrip('/').split('/')[-1]}-{first['task']}-{ctx_name(first['ctx_len'])}"
        name = "perplexity-" + re.sub(r"[^A-Za-z0-9.]+", "-", name)
        path = Path(folder) / f"{name}.png"
        for number in range(2, len(paths) + 2):  # the same names with other settings
            path = path if path not in paths else path.with_name(f"{name}-{number}.png")
        write_atomically(path, _png(group))
        paths.append(path)
    return paths


def _png(group: pd.DataFrame) -> bytes:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    first = group.iloc[0]
    for _, row in group[group["method"] == "dense"].head(1).iterrows():
        axes.axhline(row["value"], color="black", linewidth=1.2, label="dense")
    sparse = group[(group["method"] != "dense") & group["density"].notna()]
    colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Under --density a line is a method with its settings; settings given by hand are themselves the points of a line.
    lines = sparse["label"].where(sparse["density_target"].notna(), sparse["method"])
    for number, (name, points) in enumerate(sparse.groupby(lines, sort=True)):
        _line(axes, str(name), points.sort_values("density"), colors[(2 * number + number // 10) % len(colors)])
    rest = group.loc[group["method"] != "random", "value"]
    low, high = rest.min(), rest.max()
    if high > 10 * low:
        axes.set_yscale("log")
    elif group["value"].max() > 2 * high:  # the floor is far away and would press all other lines into one
        axes.set_ylim(low - 0.15 * (high - low) - 0.01 * low, high + 0.15 * (high - low) + 0.01 * high)
    axes.set_xlabel("measured density (selected / causally visible pairs)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(f"{first['model']}: {first['task']}, {ctx_name(first['ctx_len'])} tokens, {first['dtype']}", fontsize=11)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def _line(axes: Axes, method: str, points: pd.DataFrame, color: Any) -> None:
    # The spread between documents is shared by all methods; what separates them is the paired interval of the ratio to dense.
    dense = points["value"] / points["vs_dense"]
    sides = (points["value"] - points["vs_low"] * dense, points["vs_high"] * dense - points["value"])
    bars = [side.clip(lower=0).fillna(0) for side in sides]
    look: dict[str, Any] = {"color": color, "marker": "o", "capsize": 2, "elinewidth": 0.8}
    if method in FRAMING:
        look |= {"color": "dimgray", "linestyle": "--", "marker": "v" if method == "oracle" else "^"}
    worst = f" (up to {points['value'].max():.3g})" if method == "random" else ""
    axes.errorbar(points["density"], points["value"], yerr=bars, label=method + worst, **look)
