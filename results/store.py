"""Where results live: one parquet file per finished cell, so a run killed at any moment loses only the cell it was in."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from ..suites.base import SCHEMA, Cell, Score

# The long form: a row per score. `density` is what was measured and `density_target` what was asked for; `task` is the
# score's and `cell_task` the cell's. Provenance follows in columns named prov_*.
COLUMNS = {
    "key": "str", "model": "str", "revision": "str", "method": "str", "params": "str", "suite": "str", "cell_task": "str",
    "ctx_len": "int64", "density_target": "float64", "limit": "Int64", "seed": "int64", "dtype": "str", "device": "str",
    "inputs": "str", "options": "str", "task": "str", "example": "str", "metric": "str", "value": "float64", "unit": "str",
    "density": "float64", "density_min": "float64", "density_max": "float64", "status": "str", "reason": "str",
}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
STATUSES = ("ok", "failed", "skipped")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "lm_eval", "numpy", "pandas")


class Store:
    """A folder of results, opened by one run at a time.

        with Store("runs/night") as store:
            if not store.done(cell):
                store.write(cell, scores, provenance, density=0.24)

    `overwrite` makes done() forget what earlier runs wrote. Raises on entry: ValueError when the folder holds results of
    another schema (nothing is written then), or another run is writing to it.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False):
        self.folder = Path(folder)
        self.cells = self.folder / "cells"
        self.overwrite = overwrite
        self._written: set[str] = set()
        self._lock: int | None = None

    def __enter__(self) -> Store:
        self._check_schema()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"{self.folder} is not a folder") from None
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.__exit__()
            raise ValueError(f"another run is writing to {self.folder}: wait for it or choose another --out") from None
        for stale in (*self.folder.glob(".*.tmp"), *self.cells.glob(".*.tmp")):
            stale.unlink()
        write_atomically(self.folder / "schema.json", json.dumps({"schema": SCHEMA}))
        self.cells.mkdir(exist_ok=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def done(self, cell: Cell) -> bool:
        """Whether the cell is finished: stored, readable and ok. Failed and skipped cells are tried again."""
        if self.overwrite and cell.key not in self._written:
            return False
        rows = _read(self._path(cell))
        return rows is not None and bool((rows["status"] == "ok").all())

    def write(
        self, cell: Cell, scores: Iterable[Score], provenance: Mapping[str, Any], density: float | None = None,
        status: str = "ok", reason: str = "", density_range: tuple[float, float] | None = None,
    ) -> tuple[str, str]:  # fmt: skip
        """Store one cell, replacing what was stored for it, and return the status it got and the reason.

        Args: density is the measured mean and density_range the smallest and largest over layers and heads; provenance is
        free-form, nested mappings are flattened with "_"; its `label` and `note` are what tables print.
        A NaN, an infinity, no scores at all or a score given twice turn an "ok" cell into a failed one.
        """
        if status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {status!r}")
        low, high = density_range or (None, None)
        scores = list(scores) if status == "ok" else []
        fault = _fault(scores, (density, low, high)) if status == "ok" else ""
        if fault:
            status, reason, scores, density, low, high = "failed", fault, [], None, None, None
        common = {f"prov_{name}": value for name, value in _flat(provenance).items()}
        common |= {"key": cell.key, **asdict(cell), "density_target": cell.density, "cell_task": cell.task}
        common |= {"density": density, "density_min": low, "density_max": high, "status": status, "reason": reason}
        rows = [common | asdict(score) for score in scores]
        frame = _typed(pd.DataFrame(rows or [common | {"example": "", "metric": "", "value": None, "unit": ""}]))
        path = self._path(cell)
        temporary = path.with_name(f".{path.name}.tmp")
        frame.to_parquet(temporary, index=False)
        os.replace(temporary, path)
        self._written.add(cell.key)
        if status == "ok" or fault:  # a fault of the scores would come back with them
            self._journal(cell).unlink(missing_ok=True)
        return status, reason

    def checkpoint(self, cell: Cell, source: str, record: Mapping[str, Any]) -> None:
        """Keep what an unfinished cell has so far: `record` (JSON values) is added to those before it. source: digest of the
        code that made it."""
        with self._journal(cell).open("a") as file:
            file.write(json.dumps({"source": source, **record}) + "\n")

    def checkpoints(self, cell: Cell, source: str) -> list[dict[str, Any]]:
        """The records of an unfinished cell, in order; none when other code made them or everything is to be run again."""
        path = self._journal(cell)
        if not path.exists():
            return []
        *lines, cut_short = path.read_text().split("\n")
        records = [json.loads(line) for line in lines]
        if self.overwrite or any(record["source"] != source for record in records):
            path.unlink()
            return []
        if cut_short:  # by a kill; the next record would be written behind it
            write_atomically(path, "".join(f"{line}\n" for line in lines))
        return records

    def write_answers(self, cell: Cell, answers: Mapping[str, str]) -> None:
        """What the model said to every example, a JSON object a line: answers/KEY.jsonl."""
        folder = self.folder / "answers"
        folder.mkdir(exist_ok=True)
        lines = (json.dumps({"example": name, "answer": answer}) for name, answer in sorted(answers.items()))
        write_atomically(folder / f"{cell.key}.jsonl", "\n".join(lines) + "\n")

    def frame(self) -> pd.DataFrame:
        """All stored cells in the long form (see COLUMNS). Unreadable files are left out with a warning."""
        read = {path.name: _read(path) for path in sorted(self.cells.glob("*.parquet"))}
        broken = [name for name, rows in read.items() if rows is None]
        if broken:
            warnings.warn(f"{len(broken)} unreadable result files are left out, e.g. {broken[0]}", stacklevel=2)
        # All-empty columns have no type of their own; without them concat keeps the type of the files that have values.
        frames = [rows.dropna(axis=1, how="all") for rows in read.values() if rows is not None]
        return _typed(pd.concat(frames, ignore_index=True) if frames else pd.DataFrame())

    def export(self) -> Path:
        """Write the long form to results.csv."""
        path = self.folder / "results.csv"
        write_atomically(path, self.frame().to_csv(index=False))
        return path

    def _journal(self, cell: Cell) -> Path:
        return self.cells / f"{cell.key}.jsonl"

    def _path(self, cell: Cell) -> Path:
        return self.cells / f"{cell.key}.parquet"

    def _check_schema(self) -> None:
        path = self.folder / "schema.json"
        try:
            found = json.loads(path.read_text())["schema"] if path.exists() else None
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is not a schema file of this program: choose another --out") from None
        if found is None and any(self.cells.glob("*.parquet")):
            raise ValueError(f"{self.cells} holds results but {path} is missing: choose another --out")
        if found not in (None, SCHEMA):
            raise ValueError(
                f"{self.folder} holds results of schema {found}, this version writes {SCHEMA}: choose another --out"
            )


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is never seen half-written: to a hidden temporary name beside it, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def provenance() -> dict[str, Any]:
    """What the software and the machine are: package versions, python, platform, CPU, this package's commit if it has one.

    The GPU is known to the runner only, which adds it.
    """
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu_name()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts | {"source_sha256": source_digest()} | _git(ROOT)


def source_digest() -> str:
    """16 hexadecimal digits over the code that a result depends on."""
    rooms = [digest(str(ROOT / room), "*.py") for room in ("kernels", "methods", "models", "suites")]
    return hashlib.sha256("".join(rooms).encode()).hexdigest()[:16]


@functools.lru_cache
def digest(path: str, pattern: str = "*") -> str:
    """16 hexadecimal digits over the content of a file, or of the files of a folder that match `pattern` and their names."""
    root = Path(path).expanduser()
    if root.is_file():
        return hashlib.sha256(root.read_bytes()).hexdigest()[:16]
    files = (file for file in sorted(root.rglob(pattern)) if file.is_file())
    inside = [(file.relative_to(root).as_posix(), digest(str(file))) for file in files]
    return hashlib.sha256(repr(inside).encode()).hexdigest()[:16]


def _git(folder: Path) -> dict[str, Any]:
    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An installed copy may sit inside somebody else's repository, whose commit says nothing about this code.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == folder:
            return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"git_commit": None, "git_dirty": None}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _fault(scores: list[Score], densities: Iterable[float | None]) -> str:
    seen = set()
    for score in scores:
        name = f"{score.metric} of example {score.example!r} of {score.task}"
        if not math.isfinite(score.value):
            return f"{name} is {score.value}"
        if (score.task, score.example, score.metric) in seen:
            return f"{name} was given twice"
        seen.add((score.task, score.example, score.metric))
    if not all(d is None or math.isfinite(d) for d in densities):
        return "the measured density is not finite"
    return "" if scores else "the suite gave no scores"


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        else:
            flat[prefix + name] = value if value is None or isinstance(value, (bool, int, float)) else str(value)
    return flat


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The known columns first, in order and with their types; text that is missing is empty text."""
    extra = [c for c in frame.columns if c.startswith("prov_")]
    frame = frame.reindex(columns=[*COLUMNS, *extra])
    text = [c for c, kind in COLUMNS.items() if kind == "str"]
    frame[text] = frame[text].astype(object).fillna("")
    return frame.astype(COLUMNS)


def _read(path: Path) -> pd.DataFrame | None:
    """A cell's rows, or None for a file that is missing, damaged or not one of ours."""
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's errors derive from these
        return None
    return rows if len(rows) and set(COLUMNS) <= set(rows.columns) else None
