"""Style and types of the whole repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def check_passes(command, **options):
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"]])
def test_style(command):
    check_passes(command, cwd=REPO)


def test_types(tmp_path):
    (tmp_path / "sparsebench").symlink_to(REPO)  # mypy finds packages by their folder's name, and a clone may have any
    config = f"--config-file={REPO / 'pyproject.toml'}"
    check_passes(
        ["mypy", config, f"--cache-dir={tmp_path / 'cache'}", "-p", "sparsebench"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(tmp_path)},
    )
