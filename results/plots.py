"""Quality against what it costs: the Pareto table and its pictures, over measured density and measured time."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .store import write_atomically
from .tables import ROW, SETTINGS, ctx_name, overview, summary

FRAMING = ("oracle", "random")  # the ceiling and the floor of any selection
SAME_DENSITY = 0.02  # relative: how far apart calibration (models/calibrate.py) may leave two knobs turned to one target
GROUP = ["model", "revision", "suite", "task", "ctx_len", *SETTINGS, "metric"]  # the points of one picture
PARETO = [*GROUP, "unit", "label", "method", "params", "density_target", "tasks", "density", "quality", "low", "high"]
PARETO += ["time_ms", "time_source", "on_density_frontier", "on_time_frontier"]
DENSITY_LABEL = "measured density (selected / causally visible pairs)"


def pareto(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per method and density target of every perplexity and every mean over a suite's tasks (see overview()).

    `low`, `high` are the paired 95 % interval: dense's value with that of the ratio (perplexity) or difference (%) to dense.
    time_ms is ttft_ms of the latency suite for the same model, dtype, method, settings, target and context; where a group has
    none at all, total_ms of the speed suite, which is one attention layer. `time_source` names it. A point is on a frontier
    when no other has as little cost and as good a quality and is better in one; densities within SAME_DENSITY are one cost.
    On none are `oracle`, which knows the dense attention, `random`, and means over fewer `tasks` than others of the group
    have. Rows of one group, GROUP, are comparable.
    """
    return pareto_points(summary(frame), overview(frame))


def pareto_points(table: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """pareto() of what summary() and overview() gave."""
    points = pd.concat([table[table["metric"] == "perplexity"], means[means["metric"] == "mean"]], ignore_index=True)
    if points.empty:
        return points.reindex(columns=PARETO)
    ratio = points["metric"] == "perplexity"
    for side in ("low", "high"):
        of_ratio = points["value"] / points["vs_dense"] * points[f"vs_{side}"]
        points[side] = of_ratio.where(ratio, points["value"] - points["diff"] + points[f"diff_{side}"])
    points = points.rename(columns={"value": "quality"})
    groups = [_timed(group, table) for _, group in points.groupby(GROUP, dropna=False, sort=True)]
    return pd.concat([_with_frontiers(group) for group in groups], ignore_index=True)[PARETO]


def _timed(group: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """`group` with time_ms and time_source, all from one suite."""
    settings = [*ROW[2:], "ctx_len"]
    for suite, metric, same in (
        ("latency", "ttft_ms", ["model", "revision", "dtype", *settings]),
        ("speed", "total_ms", settings),
    ):
        times = table[(table["suite"] == suite) & (table["metric"] == metric) & ~table["options"].str.contains('"qkv"')]
        times = times[times["task"] != "block_map"]  # a row of the method dense, of more than attention
        times = times.drop_duplicates(same)  # the first device
        source = f"{suite} {metric}" + times["device"].map(lambda name: f" on {name}" if name else "")
        times = times[same].assign(time_ms=times["value"], time_source=source)
        found = group.merge(times, how="left", on=same)  # pandas pairs missing targets with one another
        if found["time_ms"].notna().any():
            break
    return found


def _with_frontiers(group: pd.DataFrame) -> pd.DataFrame:
    sign = -1 if group["metric"].iloc[0] == "perplexity" else 1
    quality: np.ndarray = sign * group["quality"].to_numpy(float)
    tasks = group["tasks"].astype(float)
    complete = ~group["method"].isin(FRAMING) & (tasks.isna() | (tasks == tasks.max()))
    for column, cost_column, same in (("on_density_frontier", "density", SAME_DENSITY), ("on_time_frontier", "time_ms", 0.0)):
        cost = group[cost_column].to_numpy(float)
        allowed = complete.to_numpy() & ~np.isnan(cost)
        # [other, point]; False where a cost is missing
        no_worse = (cost[:, None] <= (1 + same) * cost) & (quality[:, None] >= quality)
        better = ((1 + same) * cost[:, None] < cost) | (quality[:, None] > quality)
        group = group.assign(**{column: allowed & ~(no_worse & better & allowed[:, None]).any(axis=0)})
    return group


def quality_plots(points: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write a PNG per group of pareto() into `folder`, another where two or more methods have a time; return their paths."""
    paths: list[Path] = []
    for _, group in points.groupby(GROUP, dropna=False, sort=True):
        first = group.iloc[0]
        about = [first["model"].rstrip("/").split("/")[-1], first["task"], ctx_name(first["ctx_len"])]
        for cost, prefix in (("density", first["suite"]), ("time_ms", f"{first['suite']}-time")):
            if cost == "time_ms" and group["time_ms"].count() < 2:
                continue
            name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(filter(None, [prefix, *about])))
            path = Path(folder) / f"{name}.png"
            for number in range(2, len(paths) + 2):  # the same names with other settings
                path = path if path not in paths else path.with_name(f"{name}-{number}.png")
            alike = group[group["tasks"].isna() | (group["tasks"] == group["tasks"].max())]  # a mean of fewer tasks is another
            write_atomically(path, _png(alike, cost))
            paths.append(path)
    return paths


def _png(group: pd.DataFrame, cost: str) -> bytes:
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    first = group.iloc[0]
    for _, row in group[group["method"] == "dense"].head(1).iterrows():
        axes.axhline(row["quality"], color="black", linewidth=1.2, label="dense")
        if cost == "time_ms":
            axes.plot([row["time_ms"]], [row["quality"]], color="black", marker="s")
    sparse = group[(group["method"] != "dense") & group[cost].notna()]
    colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Under --density a line is a method with its settings; settings given by hand are themselves the points of a line.
    lines = sparse["label"].where(sparse["density_target"].notna(), sparse["method"])
    for number, (name, points) in enumerate(sparse.groupby(lines, sort=True)):
        _line(axes, str(name), points.sort_values(cost), cost, colors[(2 * number + number // 10) % len(colors)])
    edge = group[group["on_density_frontier" if cost == "density" else "on_time_frontier"]].sort_values(cost)
    axes.step(edge[cost], edge["quality"], where="post", color="gray", linewidth=0.8, zorder=0, label="frontier")
    perplexity = first["metric"] == "perplexity"
    if perplexity:
        _scale(axes, group)
    timed = group["time_source"].dropna().str.replace("_ms", "", n=1) + ", ms"
    axes.set_xlabel(DENSITY_LABEL if cost == "density" else timed.iloc[0])
    axes.set_ylabel("perplexity (lower is better)" if perplexity else "mean score over tasks, % (higher is better)")
    what = " ".join(filter(None, [first["suite"] if not perplexity else "", first["task"]]))
    axes.set_title(f"{first['model']}: {what}, {ctx_name(first['ctx_len'])} tokens, {first['dtype']}", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def _scale(axes: Axes, group: pd.DataFrame) -> None:
    rest = group.loc[group["method"] != "random", "quality"]
    low, high = rest.min(), rest.max()
    if high > 10 * low:
        axes.set_yscale("log")
    elif group["quality"].max() > 2 * high:  # the floor is far away and would press all other lines into one
        axes.set_ylim(low - 0.15 * (high - low) - 0.01 * low, high + 0.15 * (high - low) + 0.01 * high)


def _line(axes: Axes, method: str, points: pd.DataFrame, cost: str, color: Any) -> None:
    # The spread between documents is shared by all methods; what separates them is the paired interval.
    sides = (points["quality"] - points["low"], points["high"] - points["quality"])
    bars = [side.clip(lower=0).fillna(0) for side in sides]
    look: dict[str, Any] = {"color": color, "marker": "o", "capsize": 2, "elinewidth": 0.8}
    if (frame := method.partition("(")[0]) in FRAMING:
        look |= {"color": "dimgray", "linestyle": "--" if frame == method else ":", "marker": "v" if frame == "oracle" else "^"}
    far = method == "random" and points["metric"].iloc[0] == "perplexity"
    label = method + (f" (up to {points['quality'].max():.3g})" if far else "")
    axes.errorbar(points[cost], points["quality"], yerr=bars, label=label, **look)
