"""Writes docs/methods.md from the registered methods and docs/conformance.csv.

--gallery draws docs/gallery.png as well, --training docs/seer-training.png from loss.csv files of the gate trainer, --densities
docs/seer-perplexity.png from results/leaderboard/seer.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.colors import LinearSegmentedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from sparsebench.kernels.block_mass import block_mass
from sparsebench.methods import METHODS, Method
from sparsebench.methods.spec import label
from sparsebench.models import zoo
from sparsebench.models.calibrate import calibrate, capture_layers
from sparsebench.suites.corpora import token_windows

DOCS = Path(__file__).resolve().parent
GROUPS = {  # heading: (what its methods share, in reading order); a method named nowhere comes last
    "Dense attention": ("What all others are compared with.", "dense"),
    "Learned": ("A part trained for the model chooses.", "seer"),
    "Dynamic": ("From the prompt's q and k, untrained.", "minference flexprefill xattention spargeattn block_topk moba"),
    "Static": ("The same for every prompt.", "a_shape tri_shape trianglemix local strided dilated bigbird"),
    "Frame": ("The ceiling and the floor of any selection.", "oracle random"),
    "Others": ("", ""),
}
# The gallery: a head with a local part, columns and diagonals, past the layers that a method leaves dense; CELL tokens a pixel.
MODEL, CORPUS, LENGTH, LAYER, HEAD, DENSITY, CELL = "smollm2-135m", "pydoc", 2048, 20, 7, 0.25, 8
# The defaults of these select everything at this length.
SHOWN: dict[str, dict[str, Any]] = {"moba": {"chunk": 128}, "spargeattn": {"smooth_k": False}}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
CURVES = ("oracle(threshold=0.001)", "seer(last_dense=0, min_blocks=3)", "xattention", "minference", "a_shape")
COLUMNS = ["name", "what", "paper", "phase", "needs", "knob", "selection cost", "checked"]
INTRO = """# Methods

- phase: where the method is sparse; elsewhere it runs dense attention.
- needs: nothing; search (of every head's settings for a model; the fields stand in without); training (of a part for it).
- knob: the field that `--density` turns, from its sparsest to its densest value.
- selection cost: per head, for L tokens, D channels and N = L / block; the attention over what was selected comes on top.
- checked: causal entries (blocks, lines, tokens) selected as by the authors' code, on the same q and k; A: a layer of
  SmolLM2-135M, D: synthetic heads, small: short masks; a tie is within 1e-6 of the cut. "-": no selection to compare with.
"""
GALLERY = f"""![One attention head as every prefill method selects from it](gallery.png)

Layer {LAYER}, head {HEAD} (from 0) of {MODEL} on {LENGTH} tokens of Python's help topics (`{CORPUS}`), {CELL} x {CELL} a pixel.
Each knob was turned on other text until the mean density over layers and heads was {DENSITY:g}, or as near as it gets; methods
without one run as they are, `dilated` dense at this length. What was selected in this head stands above its panel.
"""
END = "This page is generated from the classes by `python docs/build.py` (with `--gallery`, the picture too)."


def grouped() -> Iterator[tuple[str, list[type[Method]]]]:
    """Heading, with a line below, and methods of every group that has some; plug-ins are left out."""
    own = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("sparsebench.methods.")}
    for heading, (text, names) in GROUPS.items():
        if found := [own.pop(name) for name in names.split() or sorted(own) if name in own]:
            yield f"## {heading}\n\n{text}\n", found


def page() -> str:
    checked, overview, sections = conformance(DOCS / "conformance.csv"), [COLUMNS], []
    for heading, classes in grouped():
        sections.append(heading)
        for cls in classes:
            text = inspect.cleandoc(cls.__doc__ or "")
            cells = [f"[{cls.name}](#{cls.name})", prose(re.split(r"(?<=\w\.)\s", text)[0]), prose(cls.paper)]
            cells += [", ".join(sorted(cls.phases, reverse=True)), cls.needs, knob(cls) if cls.knob else "", prose(cls.cost)]
            overview.append([*cells, checked.get(cls.name, "-")])
            sections.append(f"### {cls.name}\n\n{prose(text, cls)}\n\n{fields(cls)}")
    return "\n".join([INTRO, table(overview), GALLERY, *sections, END]) + "\n"


def conformance(path: Path) -> dict[str, str]:
    """Method -> how its selections agree with the authors', over all cases."""
    cases: dict[str, list[str]] = defaultdict(list)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cases[method := row.pop("method")].append(row.pop("case"))
            totals[method].update({column: int(count) for column, count in row.items()})
    texts = {}
    for method, n in totals.items():
        unequal = " and ".join(f"{kind} {n[kind]:,}" for kind in ("ties", "differences") if n[kind])
        counts = f"{', '.join(cases[method])}: {n['settings']} settings, {n['blocks']:,} entries, all equal"
        texts[method] = f"{counts} but {unequal}" if unequal else counts
    return texts


def knob(cls: type[Method]) -> str:
    (first, last), scale = cls.knob_range, ", log scale" if cls.knob_log else ""
    return f"`{cls.knob}` {first:,.10g} to {last:,.10g}{scale}; density {'rises' if first < last else 'falls'} with it"


def fields(cls: type[Method]) -> str:
    """The table of a method's fields; what one means is the comment behind it in the source."""
    source, rows = inspect.getsource(cls), [["field", "type", "default", "meaning"]]
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        comment = re.search(rf"^    {field.name}: [^#\n]*# *(.*)$", source, re.MULTILINE)
        rows.append([f"`{field.name}`", f"`{field.type}`", f"`{field.default!r}`", prose(comment[1]) if comment else ""])
    return table(rows) if rows[1:] else "No fields.\n"


def table(rows: list[list[str]]) -> str:
    lines = [" | ".join(" ".join(cell.split()).replace("|", "\\|") or "-" for cell in row) for row in rows]
    return "".join(f"| {line} |\n" for line in (lines[0], " | ".join(["---"] * len(rows[0])), *lines[1:]))


def prose(text: str, cls: type[Method] | None = None) -> str:
    """Plain text as markdown: "field: ..." a list item, other indented lines code, arXiv numbers links, the rest words."""
    name = "|".join(field.name for field in dataclasses.fields(cls)) if cls else "(?!)"  # type: ignore[arg-type]
    text = re.sub(rf"^((?:{name})(?:, (?:{name}))*): ", r"- `\1`: ", text, flags=re.MULTILINE)
    item_or_code = r"^(- .*(?:\n +\S.*)*)|\n((?:\n* {4,}\S.*)+)\n*"
    fence = "\n\n```\n{}\n```\n\n".format
    text = re.sub(item_or_code, lambda m: m[1] or fence(textwrap.dedent(m[2]).strip("\n")), text, flags=re.MULTILINE)
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):  # the others are code
        parts[i] = re.sub(r"(?<=\S)\*|\*(?=\S)|<(?=[A-Za-z/!])", r"\\\g<0>", parts[i])
        parts[i] = re.sub(r"arXiv\s(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", parts[i])
    return "".join(parts).strip()


def selections() -> Iterator[tuple[str, torch.Tensor]]:
    """(title, pixels [LENGTH / CELL, LENGTH / CELL]): dense attention's probabilities, then every method's selected share."""
    loaded = zoo.load(MODEL)
    windows = [token_windows(loaded.tokenizer, CORPUS, split, LENGTH, 1) for split in ("train", "eval")]
    train, text = (capture_layers(loaded.model, window.ids[0][1]) for window in windows)
    q, k, ctx = text[LAYER]
    visible = pixels(torch.ones(LENGTH, LENGTH).tril())
    yield "dense attention", block_mass(q, k, ctx.scale, CELL, CELL)[0, HEAD].clamp(min=1e-9) / visible
    for cls in (cls for _, classes in grouped() for cls in classes if cls.name != "dense" and "prefill" in cls.phases):
        method = cls(**SHOWN.get(cls.name, {}))
        title = label(method).replace("(", "\n(")
        if cls.knob:
            method, _ = calibrate(method, DENSITY, train, lambda method: method.prepare(loaded.spec))
        ctx.state.clear()
        mask = method.prepare(loaded.spec).select(q, k, ctx)
        head = HEAD * mask.kv_num_blocks.shape[1] // q.shape[1]  # some masks are shared by a GQA group or by all heads
        yield f"{title}\ndensity {float(mask.density()[0, head]):.2f}", pixels(mask.tokens()[0, head].float()) / visible


def pixels(pairs: torch.Tensor) -> torch.Tensor:
    return pairs.unflatten(0, (-1, CELL)).unflatten(2, (-1, CELL)).sum((1, 3))


def training_curves(files: list[Path]) -> Figure:
    """Loss and recall over the steps of every loss.csv, named by its folder; the oracle's recall as a dashed line."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    of_loss, of_recall = figure.subplots(1, 2)
    for number, file in enumerate(files):
        steps, color = pd.read_csv(file).set_index("step"), COLORS[number % len(COLORS)]
        of_loss.plot(steps["loss"], color=color, linewidth=0.4, alpha=0.5)
        of_loss.plot(
            steps["loss"].rolling(20, min_periods=1, center=True).mean(), color=color, label=file.resolve().parent.name
        )
        for column in steps.columns[steps.columns.str.endswith("_recall")]:
            measured = steps[[column, f"{column}_oracle"]].dropna()  # on some steps only
            of_recall.plot(measured[column], color=color, label=f"gate, {column.removesuffix('_recall')} of a block")
            of_recall.plot(measured[f"{column}_oracle"], color=color, linestyle="--", linewidth=1, label="oracle")
    of_loss.set(title="loss (and its mean over 20 steps)", xlabel="step", yscale="log")
    of_recall.set(title="recall at density 0.1", xlabel="step")
    for axes in (of_loss, of_recall):
        axes.grid(color="#d9d9d9", linewidth=0.5)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def perplexity_curves(board: pd.DataFrame) -> Figure:
    """Perplexity over dense, with its interval, by measured density at 8k, of the methods in CURVES; board: seer.csv."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, corpus in zip(figure.subplots(1, 2), ("books", "proofs")):
        cell = f"perplexity file:runs/seer/{corpus}-8k.jsonl 8k"
        for name, color in zip(CURVES, ("#444444", *COLORS)):
            rows = board[board["label"] == name].dropna(subset=[f"{cell} vs_dense"]).sort_values(f"{cell} density")
            ratio, low, high = (rows[f"{cell} {stat}"] for stat in ("vs_dense", "vs_low", "vs_high"))
            axes.errorbar(
                rows[f"{cell} density"], ratio, yerr=(ratio - low, high - ratio), label=name, color=color,
                linestyle="--" if name.startswith("oracle") else "-",
                marker="o", markersize=3, capsize=2, linewidth=1.2,
            )  # fmt: skip
        axes.set(title=f"{corpus}: perplexity / dense", xlabel="measured density", xscale="log", yscale="log")
        axes.grid(color="#d9d9d9", linewidth=0.5, which="both")
        for axis, ticks in ((axes.xaxis, (0.05, 0.1, 0.2, 0.5)), (axes.yaxis, (1, 1.1, 1.25, 1.5, 2, 3, 5))):
            low, high = axis.get_view_interval()
            shown = [tick for tick in ticks if low <= tick <= high]
            axis.set_ticks(shown, labels=[f"{tick:g}" for tick in shown])
            axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    return figure


def draw_gallery(path: Path) -> None:
    panels, columns = list(selections()), 6
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 0.6 + 2.0 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True).flat)
    colors = {"selected": "#0072b2", "not selected": "white", "future": "#d9d9d9"}
    look: dict = {"cmap": "viridis", "norm": LogNorm(1e-6, 1e-1)}  # of the first panel
    for number, (axes, (title, image)) in enumerate(zip(grid, panels)):
        drawn = axes.imshow(image, extent=(0, LENGTH, LENGTH, 0), **look)
        axes.set(title=title, facecolor=colors["future"])  # the future is 0 / 0, which is not drawn
        axes.tick_params(labelbottom=number + columns >= len(panels))
        if number == 0:
            scale = axes.inset_axes((0.5, 0.76, 0.42, 0.06), title="probability")
            figure.colorbar(drawn, cax=scale, orientation="horizontal", ticks=(1e-6, 1e-1))
            kept = LinearSegmentedColormap.from_list("kept", ["white", colors["selected"]])
            look = {"cmap": kept, "norm": PowerNorm(0.5, 0, 1)}  # single columns and diagonals, an eighth of a pixel, show
    grid[0].set(xticks=(0, LENGTH // 2, LENGTH), yticks=(0, LENGTH // 2, LENGTH))
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("key token")
    figure.supylabel("query token")
    marks = [Patch(facecolor=color, edgecolor="gray", label=label) for label, color in colors.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gallery", action="store_true", help="also draw gallery.png, which takes minutes on a CPU")
    parser.add_argument("--training", nargs="+", type=Path, metavar="LOSS.CSV", help="also draw seer-training.png of these")
    parser.add_argument("--densities", action="store_true", help="also draw seer-perplexity.png")
    args = parser.parse_args()
    matplotlib.rcParams |= {"font.size": 8, "axes.titlesize": 9, "figure.labelsize": 10, "legend.fontsize": 9}
    if args.gallery:
        draw_gallery(DOCS / "gallery.png")
    if args.training:
        training_curves(args.training).savefig(DOCS / "seer-training.png", dpi=130)
    if args.densities:
        board = pd.read_csv(DOCS.parent / "results" / "leaderboard" / "seer.csv")
        perplexity_curves(board).savefig(DOCS / "seer-perplexity.png", dpi=130)
    (DOCS / "methods.md").write_text(page(), encoding="utf-8")
