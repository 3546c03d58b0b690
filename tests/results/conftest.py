"""Stored cells of suites that need no model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import pytest

from sparsebench.results import Store
from sparsebench.suites.base import Cell, Score


class Results:
    """A folder of cells: add(...) writes one, frame() reads all."""

    def __init__(self, store: Store):
        self.store = store

    def add(
        self, method: str, suite: str, task: str, ctx_len: int, scores: dict[str, Iterable[float]], density: float = 1.0,
        unit: str = "%", facts: dict[str, Any] | None = None, **fields: Any,
    ) -> None:  # fmt: skip
        """One cell; scores {metric: a value per example}; `fields` are further fields of Cell, target = Cell.density."""
        fields = {"params": {}, "limit": None, "seed": 0, "dtype": "float32"} | fields
        fields["density"] = fields.pop("target", None)
        cell = Cell(model="org/tiny", revision="r", method=method, suite=suite, task=task, ctx_len=ctx_len, **fields)
        rows = [
            Score(task, f"e{i}", metric, value, unit) for metric, values in scores.items() for i, value in enumerate(values)
        ]
        assert self.store.write(cell, rows, {"label": method} | (facts or {}), density)[0] == "ok"

    def frame(self) -> pd.DataFrame:
        return self.store.frame()


@pytest.fixture
def results(tmp_path):
    with Store(tmp_path / "run") as store:
        yield Results(store)
