"""docs/methods.md: up to date, complete, and in agreement with the authors' code."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest

from sparsebench.methods import METHODS, base

DOCS = Path(__file__).resolve().parent.parent / "docs"
BUILTIN = sorted(name for name, cls in METHODS.items() if cls.__module__.startswith("sparsebench.methods."))


@pytest.fixture(scope="module")
def agreement():
    with (DOCS / "conformance.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_page_is_what_the_classes_say(build):
    committed = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert committed == build.page(), "run: python docs/build.py"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", committed):
        assert 0 < (DOCS / picture).stat().st_size < 400_000


@pytest.mark.parametrize("name", BUILTIN)
def test_every_method_is_described(build, name):
    cls = METHODS[name]
    assert cls.paper and cls.cost
    page = build.page()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| [{name}](#{name}) |")]
    assert row.count(" | ") == 7 and build.prose(cls.paper) in row and cls.cost in row and cls.needs in row
    headings = [line.lstrip("# ").lower().replace(" ", "-") for line in page.splitlines() if line.startswith("#")]
    assert headings.count(name) == 1  # else the overview's link goes to another heading
    section = page.split(f"\n### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
    for field in dataclasses.fields(cls):
        assert f"| `{field.name}` |" in section and repr(field.default) in section


def test_plugins_are_left_out(build, monkeypatch):
    class Plugin(base.Method):
        """Not of the package."""

        name = "elsewhere"

    before = build.page()
    monkeypatch.setitem(METHODS, "elsewhere", Plugin)
    assert build.page() == before


def test_every_comparison_is_counted(agreement):
    """The table has the methods whose tests compare with the authors' selections, no fewer."""
    tests = Path(__file__).parent / "methods"
    compared = {file.stem for file in tests.glob("test_*.py") if "check_conforms(" in file.read_text()}
    files = {"static": {"tri_shape"}}
    assert {row["method"] for row in agreement} == set().union(*(files.get(name[5:], {name[5:]}) for name in compared))


def test_conformance_counts(build, agreement, tmp_path):
    """Committed: no entry differs, and counts add up. Made up: ties and differences would be named."""
    assert agreement
    for row in agreement:
        blocks, equal, ties, differences = (int(row[name]) for name in ("blocks", "equal", "ties", "differences"))
        assert row["method"] in METHODS and blocks == equal + ties + differences and equal > 0
        assert differences == 0, row
    table = tmp_path / "table.csv"
    table.write_text(
        "method,case,settings,blocks,equal,ties,differences\nx,A,2,1000,999,1,0\nx,D,3,500,498,0,2\ny,A,1,5,5,0,0\n"
    )
    assert build.conformance(table) == {
        "x": "A, D: 5 settings, 1,500 entries, all equal but ties 1 and differences 2",
        "y": "A: 1 settings, 5 entries, all equal",
    }


def test_text_becomes_markdown(build):
    text = "See a*b and 2 * c <x (arXiv\n2410.13276):\n    a*b   left alone\n    second\nThe end."
    assert build.prose(text) == (
        "See a\\*b and 2 * c \\<x ([arXiv 2410.13276](https://arxiv.org/abs/2410.13276)):\n\n"
        "```\na*b   left alone\nsecond\n```\n\nThe end."
    )
    seer = METHODS["seer"]
    text = "gate: a folder\n    of files.\nbudget, top_p: numbers.\n\nother: stays."
    assert build.prose(text, seer) == "- `gate`: a folder\n    of files.\n- `budget, top_p`: numbers.\n\nother: stays."
    assert build.knob(seer) == "`threshold` 1 to 1e-12, log scale; density falls with it"
    assert build.table([["a", "b"], ["x|y\nz", ""]]) == "| a | b |\n| --- | --- |\n| x\\|y z | - |\n"
