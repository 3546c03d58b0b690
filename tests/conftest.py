"""Shared fixtures: the authors' own outputs, poisoned memory, seeds."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")  # read when triton is imported

import numpy as np
import pytest
import torch
from safetensors import safe_open

REPO = Path(__file__).resolve().parent.parent
FULL = Path(os.environ.get("SPARSEBENCH_CONFORMANCE", REPO.parent / "shared" / "conformance"))
COMPACT = Path(__file__).parent / "conformance"  # case A, query heads 0-2 with KV head 0


AGREEMENT: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 5)  # (method, case) -> what COLUMNS counts
COLUMNS = ("settings", "blocks", "equal", "ties", "differences")


def pytest_addoption(parser):
    parser.addoption("--conformance-csv", help="write the agreement with the authors' own selections to this file")


def pytest_terminal_summary(terminalreporter, config):
    rows = [(*key, *counts) for key, counts in sorted(AGREEMENT.items())]
    if not rows:
        return
    terminalreporter.section("selections compared with the authors' own code")
    terminalreporter.write_line("{:12} {:>4} {:>8} {:>10} {:>10} {:>5} {:>11}".format("method", "case", *COLUMNS))
    for row in rows:
        terminalreporter.write_line("{:12} {:>4} {:8d} {:10d} {:10d} {:5d} {:11d}".format(*row))
    if path := config.getoption("--conformance-csv"):
        with open(path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("method", "case", *COLUMNS), *rows])


@pytest.fixture(scope="session")
def build():
    """docs/build.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_build", REPO / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check_conforms():
    """check_conforms(method, case, setting, ours, theirs, margin): asserts that selections agree and counts it for the table.

    ours, theirs: bool tensors of one shape, an entry per block, column or (query, chunk); of maps [heads, rows, columns] only
    the causal part counts as compared, differences count everywhere. margin: how far the entry's score is
    from the cut between kept and dropped, where a difference within 1e-6 is a tie; without it every difference counts.
    """

    def compare(method, case, setting, ours, theirs, margin=None):
        assert ours.dtype == theirs.dtype == torch.bool and ours.shape == theirs.shape and theirs.any()
        wrong = ours != theirs
        tied = wrong & (margin.abs() <= 1e-6) if margin is not None else torch.zeros_like(wrong)
        rows, columns = ours.shape[-2:]
        past = torch.arange(columns) * rows < (torch.arange(rows)[:, None] + 1) * columns  # in a map, what causality leaves
        counted = past.expand(ours.shape) if ours.ndim > 2 else torch.ones_like(wrong)
        equal = int((counted & ~wrong).sum())
        counts = (1, equal + int(wrong.sum()), equal, int(tied.sum()), int((wrong & ~tied).sum()))
        total = AGREEMENT[method, case]
        total[:] = [a + b for a, b in zip(total, counts)]
        assert counts[-1] == 0, f"{method}, case {case}, {setting}: {counts[-1]} of {counts[1]} entries differ"

    return compare


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Tensors of tiny models are far too small to share between threads, which wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Llama of 2 layers, 4 query heads and 2 KV heads, 1024 tokens, whose tokens are characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {"?": 0, **{letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ", 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Conformance:
    """Tensors of one file, read by name; a name ending in .bits comes back as a bool tensor."""

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt")
        self.shapes = json.loads((self.file.metadata() or {}).get("shapes_of_bits", "{}"))

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        if not name.endswith(".bits"):
            return tensor
        shape = self.shapes[name]
        bits = np.unpackbits(tensor.numpy(), bitorder="little")[: int(np.prod(shape))]
        return torch.from_numpy(bits.astype(bool)).reshape(shape)


@pytest.fixture(scope="session")
def conformance():
    """conformance("A_inputs") -> Conformance: the full folder when present, else the compact subset kept here."""

    def load(name: str) -> Conformance:
        folder = FULL if FULL.is_dir() else COMPACT
        path = folder / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"{name} is not in the compact conformance subset")
        return Conformance(path)

    return load
