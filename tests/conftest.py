"""Shared fixtures: the authors' own outputs, poisoned memory, seeds."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")  # read when triton is imported

import numpy as np
import pytest
import torch
from safetensors import safe_open

REPO = Path(__file__).resolve().parent.parent
FULL = Path(os.environ.get("SPARSEBENCH_CONFORMANCE", REPO.parent / "shared" / "conformance"))
COMPACT = Path(__file__).parent / "conformance"  # case A, query heads 0-2 with KV head 0


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
