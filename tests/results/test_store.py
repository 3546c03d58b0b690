"""The store: what a cell's identity is, and that no run can lose, mix or half-write results."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from sparsebench.results.store import COLUMNS, Store, provenance
from sparsebench.suites.base import SUITES, Cell, Score, Suite, register_suite

CELL = Cell(
    model="tiny", revision="r1", method="seer", params={"threshold": 0.5, "block": 64}, suite="perplexity", task="pydoc",
    ctx_len=2048, density=0.25, limit=2, seed=0, dtype="float32",
)  # fmt: skip
SCORES = [Score("pydoc", "a", "nll", 1.0 / 3.0, "nats"), Score("pydoc", "a", "tokens", 3, "tokens")]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Cell)])
def test_every_field_changes_the_key(field):
    changed = {
        "params": {"threshold": 0.6, "block": 64},
        "ctx_len": 4096,
        "density": None,
        "limit": None,
        "seed": 1,
        "options": {"stride": 64},
    }
    assert dataclasses.replace(CELL, **{field: changed.get(field, "other")}).key != CELL.key


def test_key_ignores_spelling():
    same = dataclasses.replace(CELL, params='{"block": 64.0, "threshold": 0.5}')
    assert same == CELL and same.key == CELL.key and len(CELL.key) == 16
    assert dataclasses.replace(CELL, density=1).key == dataclasses.replace(CELL, density=1.0).key
    assert CELL.settings == {"threshold": 0.5, "block": 64}


def test_schema_version_is_part_of_the_key(monkeypatch):
    before = CELL.key
    monkeypatch.setattr("sparsebench.suites.base.SCHEMA", 99)
    assert CELL.key != before


@pytest.mark.parametrize("params", [{"x": float("nan")}, {"x": object()}, "[1]"])
def test_bad_params_are_refused(params):
    with pytest.raises(ValueError):
        dataclasses.replace(CELL, params=params)


def test_duplicate_suite_is_refused(monkeypatch):
    monkeypatch.setattr("sparsebench.suites.base.SUITES", dict(SUITES))
    twin = type("Twin", (Suite,), {"name": "twin"})
    register_suite(twin)
    with pytest.raises(ValueError, match="'twin' is registered already"):
        register_suite(twin)


def test_a_row_is_cell_score_density_and_provenance(tmp_path):
    with Store(tmp_path / "run") as store:
        about = {"label": "seer(t)", "wall_s": 1.5, "gpu": None, "versions": {"torch": "2.11"}}
        assert store.write(CELL, SCORES, about, density=0.24, density_range=(0.1, 0.4)) == ("ok", "")
        rows = store.frame()
    assert list(rows.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert len(rows) == 2
    row = rows.iloc[0].to_dict()
    expected = dataclasses.asdict(CELL) | {"cell_task": "pydoc", "density_target": 0.25, "density": 0.24, "key": CELL.key}
    expected |= {"example": "a", "metric": "nll", "value": 1 / 3, "unit": "nats", "density_min": 0.1, "density_max": 0.4}
    expected |= {"status": "ok", "reason": "", "prov_label": "seer(t)", "prov_wall_s": 1.5, "prov_versions_torch": "2.11"}
    assert {name: row[name] for name in expected} == expected


def test_done_only_for_ok_and_readable(tmp_path):
    with Store(tmp_path) as store:
        assert not store.done(CELL)
        store.write(CELL, [], {}, status="skipped", reason="too long")
        assert not store.done(CELL)
        store.write(CELL, [], {}, status="failed", reason="boom")
        assert not store.done(CELL)
        store.write(CELL, SCORES, {})
        assert store.done(CELL)
        assert list(store.frame()["status"]) == ["ok", "ok"]  # what was written last replaces the rest
    with Store(tmp_path) as store:
        assert store.done(CELL)
    with Store(tmp_path, overwrite=True) as store:
        assert not store.done(CELL)
        store.write(CELL, SCORES, {})
        assert store.done(CELL)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "flipped"])
def test_a_damaged_file_is_not_done(tmp_path, damage):
    other = dataclasses.replace(CELL, seed=1)
    with Store(tmp_path) as store:
        store.write(CELL, SCORES, {})
        store.write(other, SCORES, {})
        path = tmp_path / "cells" / f"{CELL.key}.parquet"
        whole = path.read_bytes()
        broken = {
            "truncated": whole[:-7],
            "garbage": b"not parquet",
            "empty": b"",
            "flipped": whole[:4] + bytes(200) + whole[204:],
        }
        path.write_bytes(broken[damage])
        assert not store.done(CELL) and store.done(other)
        with pytest.warns(UserWarning, match=f"1 unreadable .*{CELL.key}"):
            assert set(store.frame()["key"]) == {other.key}
        store.write(CELL, SCORES, {})
        assert store.done(CELL) and len(store.frame()) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_fails_the_whole_cell(tmp_path, value):
    with Store(tmp_path) as store:
        status, reason = store.write(CELL, [*SCORES, Score("pydoc", "b", "nll", value, "nats")], {}, density=0.2)
        rows = store.frame()
        assert not store.done(CELL)
    assert len(rows) == 1 and pd.isna(rows["value"][0]) and rows["status"][0] == "failed"
    assert status == "failed" and rows["reason"][0] == reason == f"nll of example 'b' of pydoc is {value}"


@pytest.mark.parametrize(
    "scores, density, reason",
    [([], 0.2, "no scores"), (SCORES + SCORES[:1], 0.2, "given twice"), (SCORES, float("nan"), "density is not finite")],
)
def test_other_faults_fail_the_cell(tmp_path, scores, density, reason):
    with Store(tmp_path) as store:
        assert store.write(CELL, scores, {}, density=density)[0] == "failed"
        assert reason in store.frame()["reason"][0]


def test_unknown_status_is_refused(tmp_path):
    with Store(tmp_path) as store, pytest.raises(ValueError, match="'done'"):
        store.write(CELL, SCORES, {}, status="done")


@pytest.mark.parametrize("content", ['{"schema": 999}', "{", "[]"])
def test_another_schema_is_refused_and_nothing_written(tmp_path, content):
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(ValueError, match="choose another --out"), Store(tmp_path):
        pass
    assert os.listdir(tmp_path) == ["schema.json"] and (tmp_path / "schema.json").read_text() == content


def test_cells_without_a_schema_file_are_refused(tmp_path):
    with Store(tmp_path) as store:
        store.write(CELL, SCORES, {})
    (tmp_path / "schema.json").unlink()
    with pytest.raises(ValueError, match=r"schema\.json is missing"), Store(tmp_path):
        pass


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="is not a folder"), Store(path):
            pass


def test_frame_mixes_cells_of_different_provenance(tmp_path):
    with Store(tmp_path) as store:
        store.write(CELL, SCORES, {"gpu": None, "documents": 3, "odd": 1})
        store.write(dataclasses.replace(CELL, limit=None, density=None), SCORES, {"gpu": "H100", "odd": "one"}, density=1.0)
        store.write(dataclasses.replace(CELL, seed=2), [], {}, status="failed", reason="x")
        rows = store.frame()
    assert len(rows) == 5 and {c: str(rows[c].dtype) for c in ("ctx_len", "limit", "value")} == {
        "ctx_len": "int64", "limit": "Int64", "value": "float64",
    }  # fmt: skip
    assert set(rows["prov_gpu"].dropna()) == {"H100"}


def test_csv_round_trip(tmp_path):
    with Store(tmp_path) as store:
        store.write(CELL, SCORES, {"label": 'a, "b"'}, density=0.1 + 0.2)
        store.write(dataclasses.replace(CELL, seed=1), [], {}, status="failed", reason="two\nlines")
        rows, path = store.frame(), store.export()
        again = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert path.name == "results.csv" and list(again.columns) == list(rows.columns) and len(again) == 3
    for name, kind in COLUMNS.items():
        read = list(again[name]) if kind == "str" else [float(text) if text else None for text in again[name]]
        assert read == [None if pd.isna(value) else value for value in rows[name]], name


def test_empty_store(tmp_path):
    with Store(tmp_path) as store:
        assert store.frame().empty and list(store.frame().columns) == list(COLUMNS)
        assert pd.read_csv(store.export()).empty


def test_provenance_says_what_ran():
    facts = provenance()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["pandas"] == pd.__version__ and facts["cpu"] is not None
    assert {"torch", "triton", "transformers", "numpy", "platform", "git_commit", "git_dirty"} <= set(facts)
    json.dumps(facts)


def test_provenance_survives_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_commit"] is None and provenance()["git_dirty"] is None


def test_a_write_that_dies_half_way_leaves_no_cell(tmp_path, monkeypatch):
    def half(frame, path, **kwargs):
        path.write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    with Store(tmp_path) as store:
        monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
        with pytest.raises(KeyboardInterrupt):
            store.write(CELL, SCORES, {})
        assert not list(store.cells.glob("*.parquet")) and not store.done(CELL)
    with Store(tmp_path) as store:
        assert os.listdir(store.cells) == [] and store.frame().empty


WRITER = """
import dataclasses, sys, time
from sparsebench.results.store import Store
from sparsebench.suites.base import Cell, Score
cell = Cell("tiny", "", "dense", {}, "perplexity", "pydoc", 64, None, None, 0, "float32")
scores = [Score("pydoc", str(i), "nll", i / 7, "nats") for i in range(300)]
with Store(sys.argv[1]) as store:
    print("open", flush=True)
    for seed in range(int(sys.argv[2])):
        store.write(dataclasses.replace(cell, seed=seed), scores, {})
    time.sleep(60)
"""


def _writer(folder, cells):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(cells)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    return child


def test_kill_in_the_middle_leaves_only_whole_cells_and_no_lock(tmp_path):
    child = _writer(tmp_path, 100_000)
    cells = tmp_path / "cells"
    deadline = time.monotonic() + 20
    while len(list(cells.glob("*.parquet"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is writing to"), Store(tmp_path):
        pass
    # Stop it where a temporary file is on disk if that moment can be caught, so that a half-written one is left behind.
    while not list(cells.glob(".*.tmp")) and time.monotonic() < deadline:
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (cells / ".0123456789abcdef.parquet.tmp").write_bytes(b"half")
    with Store(tmp_path) as store:  # the lock went with the process
        rows = store.frame()
        assert not list(cells.glob(".*.tmp"))
    assert rows["key"].nunique() >= 20
    assert set(rows.groupby("key").size()) == {300} and set(rows["status"]) == {"ok"}


def test_a_record_cut_short_by_a_kill_does_not_swallow_the_next(tmp_path):
    with Store(tmp_path) as store:
        store.checkpoint(CELL, "code", {"number": 1})
    (journal,) = tmp_path.glob("cells/*.jsonl")
    journal.write_text(journal.read_text() + '{"source": "co')
    with Store(tmp_path) as store:
        assert [record["number"] for record in store.checkpoints(CELL, "code")] == [1]
        store.checkpoint(CELL, "code", {"number": 2})
    with Store(tmp_path) as store:
        assert [record["number"] for record in store.checkpoints(CELL, "code")] == [1, 2]


def test_records_are_kept_for_another_try_unless_their_scores_are_at_fault(tmp_path):
    with Store(tmp_path) as store:
        store.checkpoint(CELL, "code", {"number": 1})
        store.write(CELL, [], {}, status="failed", reason="out of memory")
        assert store.checkpoints(CELL, "code")
        store.write(CELL, [Score("pydoc", "a", "nll", math.nan, "nats")], {})
        assert not store.checkpoints(CELL, "code")


def test_records_of_other_code_or_to_be_overwritten_are_dropped(tmp_path):
    for overwrite, source in ((False, "other"), (True, "code")):
        with Store(tmp_path) as store:
            store.checkpoint(CELL, "code", {"number": 1})
        with Store(tmp_path, overwrite=overwrite) as store:
            assert store.checkpoints(CELL, source) == [] and not list(tmp_path.glob("cells/*.jsonl"))
