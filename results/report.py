"""The files of a finished run: the leaderboard, the Pareto table, plots, and one HTML page with everything a reader needs."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from .plots import pareto_points, quality_plots
from .store import write_atomically
from .tables import (
    DENSITY,
    PROVENANCE,
    ROW,
    STATS,
    TEXT,
    TIMED,
    VERSUS,
    ctx_name,
    metric_name,
    overview,
    summary,
    varying,
)  # fmt: skip
from .text import alarms, legend, notes, problems, sections

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}th,td{padding:.25em .7em;text-align:left;
border-bottom:1px solid #ddd;white-space:nowrap}img{max-width:100%}"""


def write(frame: pd.DataFrame, folder: str | Path, versus: str | None = None) -> None:
    """Write leaderboard.csv, pareto.csv, the plots (PNG) and report.html, which needs no other file.

    `frame` is Store.frame(); `versus` is a method to compare with besides dense, see summary(): in the report's tables and as
    the columns VERSUS of leaderboard.csv.
    """
    folder = Path(folder)
    table, means = summary(frame, versus), overview(frame, versus)
    points = pareto_points(table, means)
    write_atomically(folder / "leaderboard.csv", _board(frame, table, means).to_csv(index=False))
    write_atomically(folder / "pareto.csv", points.to_csv(index=False))
    page = _page(frame, table, means, quality_plots(points, folder), f"sparsebench: {folder.resolve().name}", versus)
    write_atomically(folder / "report.html", page)


def leaderboard(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per model x method x params (x density target); columns "suite task metric ctx" (the metric is left out where it
    is the suite's name: "perplexity pydoc 2k"; of several tasks together "ruler mean 8k", "ruler wavg_inc"), each followed by
    its STATS, then the measured density; last, what the row was measured on. Settings that differ within a suite are spelt in
    the column's name, so different measurements never mix."""
    return _board(frame, summary(frame), overview(frame))


def _board(frame: pd.DataFrame, table: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    rows: dict[tuple, dict[str, Any]] = {}
    keys: dict[tuple, set[str]] = {}
    for suite, group in table.groupby("suite", sort=True):
        settings_named = varying(group)
        for record in means[means["suite"] == suite].to_dict("records") + group.to_dict("records"):
            identity = tuple(None if pd.isna(record[name]) else record[name] for name in ROW)
            keys.setdefault(identity, set()).add(record.get("key", ""))
            row = rows.setdefault(identity, dict(zip(ROW, identity)) | dict.fromkeys(TEXT, ""))
            row |= {
                name: row[name] if record[name] in row[name] else f"{row[name]}; {record[name]}".strip("; ") for name in TEXT
            }
            settings = [f"{name}={record[name]}" for name in settings_named if name != "inputs" or record[name]]
            place = [str(suite), record["task"], ctx_name(record["ctx_len"]) if record["ctx_len"] else "", *settings]
            column = " ".join(filter(None, [*place[:2], metric_name(record["metric"], str(suite)), *place[2:]]))
            row[column] = record["value"]
            if suite not in TIMED:
                row |= {f"{column} {stat}": record[stat] for stat in ("tasks", *STATS, *VERSUS) if stat in record}
            row |= {" ".join(filter(None, [*place, name])): record[name] for name in DENSITY}
    for name in (name for name in PROVENANCE if f"prov_{name}" in frame):
        values = frame.drop_duplicates("key").set_index("key")[f"prov_{name}"].dropna().astype(str)
        for identity, row in rows.items():
            row[name] = "; ".join(sorted(set(values[values.index.isin(keys[identity])]) - {""})) or None
    board = pd.DataFrame(list(rows.values()))
    lead = [*ROW[:3], *TEXT, *ROW[3:]]
    filled = [name for name in board.columns if name not in lead and board[name].replace("", None).notna().any()]
    board = board.reindex(columns=[*lead, *sorted(filled, key=lambda name: name in PROVENANCE)])
    order = board.assign(sparse=board["method"] != "dense")
    return board.loc[order.sort_values(["model", "sparse", "label", "density_target"]).index].reset_index(drop=True)


def _page(
    frame: pd.DataFrame, table: pd.DataFrame, means: pd.DataFrame, plots: Iterable[Path], title: str, versus: str | None
) -> str:
    """The report as one HTML page with `plots` (PNG files) embedded."""
    body = [f"<h1>{escape(title)}</h1>"]
    if table.empty:
        body.append("<p>No results yet.</p>")
    shown = sections(table, means, versus)
    for heading, rows in shown:
        body += [f"<h2>{escape(heading)}</h2>", _html(rows)]
    if not table.empty:
        body.append(
            "<p>In brackets: 95 % bootstrap intervals over documents or examples (n = 1 has none). Density is measured. "
            "Against dense: a paired ratio (perplexity) or difference (%) and a mark, worse or better at p &lt; 0.05 of a "
            "paired sign-flip test, same where no difference is shown, n&lt;6 where so few examples could show none.</p>"
        )
        body += [f"<p>{escape(line)}.</p>" for line in legend(shown, table)]
    for plot in plots:
        picture = base64.b64encode(plot.read_bytes()).decode()
        body.append(f'<p><img alt="{escape(plot.stem)}" src="data:image/png;base64,{picture}"></p>')
    for heading, lines in (
        ("Look again", alarms(table, means)),
        ("Skipped and failed", problems(frame)),
        ("Notes", notes(table)),
    ):
        if lines:
            body += [f"<h2>{heading}</h2><ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    body += ["<h2>Leaderboard</h2>", _html(_board(frame, table, means)), "<h2>Provenance</h2>", _html(_provenance(frame))]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    text = "\n".join(body)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{text}\n</body></html>\n'


def _html(table: pd.DataFrame) -> str:
    return f"<div>{table.to_html(index=False, na_rep='', border=0, float_format='{:.4g}'.format)}</div>"


def _provenance(frame: pd.DataFrame) -> pd.DataFrame:
    """The distinct values of every provenance column, in how many cells; columns with a value per cell are counted only."""
    rows = []
    cells = frame.drop_duplicates("key")
    for column in (c for c in frame.columns if c.startswith("prov_") and c not in ("prov_label", "prov_note")):
        counts = cells[column].dropna().astype(str).value_counts()
        values = [f"{value} ({count})" if len(counts) > 1 else str(value) for value, count in counts.items()]
        text = "; ".join(values) if len(values) <= 6 else f"{len(values)} different values, see results.csv"
        rows.append({"what": column.removeprefix("prov_"), "value (cells)": text})
    return pd.DataFrame(rows, columns=["what", "value (cells)"])
