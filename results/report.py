"""One HTML file with everything a reader needs: tables, plots, what is missing and why, and what the numbers ran on."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from .plots import perplexity_plots
from .store import write_atomically
from .tables import leaderboard, summary
from .text import alarms, compact, notes, problems

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}
div{overflow-x:auto}table{border-collapse:collapse;font-size:13px}th,td{padding:.25em .7em;text-align:left;
border-bottom:1px solid #ddd;white-space:nowrap}img{max-width:100%}"""


def write(frame: pd.DataFrame, folder: str | Path) -> None:
    """Write leaderboard.csv, the plots (PNG) and report.html, which needs no other file. `frame` is Store.frame()."""
    folder = Path(folder)
    write_atomically(folder / "leaderboard.csv", leaderboard(frame).to_csv(index=False))
    page = render(frame, perplexity_plots(frame, folder), title=f"sparsebench: {folder.resolve().name}")
    write_atomically(folder / "report.html", page)


def render(frame: pd.DataFrame, plots: Iterable[Path], title: str) -> str:
    """The report as one HTML page with `plots` (PNG files) embedded."""
    table = summary(frame)
    body = [f"<h1>{escape(title)}</h1>"]
    if table.empty:
        body.append("<p>No results yet.</p>")
    for _, group in table.groupby(["suite", "model"], sort=True):
        heading, rows = compact(group)
        body += [f"<h2>{escape(heading)}</h2>", _html(rows)]
    if not table.empty:
        body.append(
            "<p>In brackets: 95 % bootstrap intervals over documents or examples (n = 1 has none). Density is measured.</p>"
        )
    for plot in plots:
        picture = base64.b64encode(plot.read_bytes()).decode()
        body.append(f'<p><img alt="{escape(plot.stem)}" src="data:image/png;base64,{picture}"></p>')
    for heading, lines in (("Look again", alarms(table)), ("Skipped and failed", problems(frame)), ("Notes", notes(table))):
        if lines:
            body += [f"<h2>{heading}</h2><ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    body += ["<h2>Leaderboard</h2>", _html(leaderboard(frame)), "<h2>Provenance</h2>", _html(_provenance(frame))]
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
