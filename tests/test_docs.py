"""The documentation's examples run as they are printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import sparsebench
from sparsebench.methods import METHODS
from sparsebench.methods.minference.search import GRID
from sparsebench.methods.seer import distill, extend
from sparsebench.methods.seer.training import write_history
from sparsebench.methods.spec import load_plugin
from sparsebench.suites.corpora import read_documents

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"


def test_add_a_method_example(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (DOCS / "add-a-method.md").read_text(), re.DOTALL)
    assert len(code[0].splitlines()) < 30
    plugin = tmp_path / "pooled.py"
    plugin.write_text(code[0])
    try:
        assert load_plugin(str(plugin)) == {"pooled"}
        q, k, v = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16), torch.randn(1, 2, 1000, 16)
        names = {"Pooled": METHODS["pooled"], "q": q, "k": k, "v": v}
        for example in code[1:]:
            exec(example, names)
        mask = names["mask"]
        assert mask.kv_num_blocks.shape == (1, 4, 16)
        half_a_block = 64 * 64 / 2 / (1000 * 1001 / 2)
        assert float((mask.density() - 0.25).abs().max()) < half_a_block
        assert not torch.equal(mask.kv_indices[:, 0], mask.kv_indices[:, 1])  # every head chooses for itself
        assert torch.equal(names["out"], sparsebench.attention(METHODS["pooled"](density=0.25), q, k, v)[0])
    finally:
        METHODS.pop("pooled", None)


def test_readme_says_how_much_text_there_is_and_is_needed():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    held = len(list(read_documents("pydoc", "eval")))
    assert f"`pydoc` (embedded, {held} documents to evaluate on" in readme and f"(`pydoc`: {held})" in readme
    assert f"MInference's of {2 * max(candidate.vertical for candidate in GRID)} tokens or more" in readme


SEER = (DOCS / "seer.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trainer, heading", [(distill, "Train a gate"), (extend, "Extend a model")])
def test_every_option_of_the_trainers_is_described(trainer, heading, capsys):
    with pytest.raises(SystemExit):
        trainer.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1])) - {"--help"}
    section = SEER.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    described = {flag for line in section.splitlines() if line.startswith("|") for flag in re.findall(r"`(--[a-z-]+)`", line)}
    commands = re.findall(rf"-m {trainer.__name__} (.*)", section.replace("\\\n", ""))
    assert commands and set(re.findall(r"--[a-z-]+", " ".join(commands))) <= options - {"--nproc-per-node"}
    assert described | {"--model", "--data", "--out"} == options


def test_seer_page_names_every_field_and_links_to_what_exists():
    section = SEER.split("\n## Use a gate\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(METHODS["seer"]().params())
    for link in re.findall(r"\]\((?!http)(.*?)\)", SEER):
        assert (DOCS / link.partition("#")[0]).is_file(), link


def test_the_claims_are_measured_on_pieces_of_the_evaluation_documents(tmp_path):
    """The first step of seer.sh: pieces of 8k and 32k tokens, and two training documents to turn knobs on."""
    docs = [{"id": "x", "split": "eval", "text": " one" * 17000}] + [{"id": n, "split": "train", "text": n} for n in "abc"]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    script, corpus = REPO / "results" / "leaderboard" / "seer.sh", str(tmp_path / "docs.jsonl")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(script), str(tmp_path / "out"), corpus, corpus, "windows"]
    subprocess.run(command, check=True, cwd=REPO, env=os.environ | {"PATH": path})
    for name in ("books", "proofs"):
        short, long = (
            [json.loads(line) for line in (tmp_path / "out" / f"{name}-{length}.jsonl").read_text().splitlines()]
            for length in ("8k", "32k")
        )
        assert [f"{doc['split']} {doc['id']}" for doc in short] == ["eval x-0", "eval x-1", "train a", "train b"]
        assert [doc["id"] for doc in long] == ["a", "b"]
        assert short[0]["text"] == short[1]["text"] == " one" * 8208


def test_perplexity_curves_show_what_is_published(build):
    board = pd.read_csv(REPO / "results" / "leaderboard" / "seer.csv")
    for axes, corpus in zip(build.perplexity_curves(board).axes, ("books", "proofs")):
        for name, drawn in zip(build.CURVES, axes.containers, strict=True):
            cell = f"perplexity file:runs/seer/{corpus}-8k.jsonl 8k"
            published = board[board["label"] == name].set_index(f"{cell} density")[f"{cell} vs_dense"].dropna().sort_index()
            assert drawn.lines[0].get_xydata().tolist() == list(map(list, published.items())) and len(published) >= 4


def test_training_curves_show_what_the_files_say(tmp_path, build):
    rows = [{"step": i, "loss": 1 / (i + 1)} for i in range(30)]
    for row in rows[::10]:
        row |= {"mass_recall": row["step"] / 40, "mass_recall_oracle": 0.9}
    write_history(tmp_path / "mine" / "loss.csv", rows)
    figure = build.training_curves([tmp_path / "mine" / "loss.csv"])
    loss, recall = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [row["loss"] for row in rows] and loss.lines[1].get_label() == "mine"
    assert [line.get_ydata().tolist() for line in recall.lines] == [[0, 0.25, 0.5], [0.9, 0.9, 0.9]]
    assert recall.lines[0].get_xdata().tolist() == [0, 10, 20]
    figure.savefig(tmp_path / "curves.png")
