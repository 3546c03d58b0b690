"""What is installed: the wheel holds every room and every shipped gate, and the script does not shadow other packages."""

from __future__ import annotations

import configparser
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "methods", "models", "suites", "results")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's files, built from a copy of what is in the rooms."""
    setuptools = int(importlib.metadata.version("setuptools").split(".")[0]) if _installed("setuptools") else 0
    if setuptools < 77:
        pytest.skip(f"building a wheel needs setuptools>=77, this environment has {setuptools or 'none'}")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ROOMS:
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*REPO.glob("*.py"), REPO / "pyproject.toml", REPO / "README.md", REPO / "LICENSE"):
        shutil.copy(file, source)
    command = [sys.executable, "-c", BUILD, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(built.glob("sparsebench-*.whl")))


def _installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_the_wheel_holds_every_module_and_gate(wheel):
    modules = [file for name in ROOMS for file in (REPO / name).rglob("*.py")] + list(REPO.glob("*.py"))
    gates = [file for file in (REPO / "methods" / "seer" / "gates").glob("*/*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in gates)
    expected = {f"sparsebench/{file.relative_to(REPO)}" for file in modules + gates}
    assert expected <= set(wheel.namelist())


def test_the_wheel_brings_its_command_and_licence_and_no_tests(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sparsebench"}
    assert not any("test" in name for name in names)
    (entry,) = (name for name in names if name.endswith("entry_points.txt"))
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(entry).decode())
    assert dict(scripts["console_scripts"]) == {"sparsebench": "sparsebench.run_bench:main"}
    assert any(name.endswith("LICENSE") for name in names)


PLUGIN = """
import importlib.util, pathlib, sys
from dataclasses import dataclass
from sparsebench.methods import Method, register

found = {name: importlib.util.find_spec(name) for name in ("kernels", "methods", "suites")}
pathlib.Path("found").write_text("\\n".join(str(spec and spec.origin) for spec in found.values()))


@register
@dataclass(frozen=True)
class Own(Method):
    name = "own"

    def attend(self, q, k, v, ctx):
        return q
"""


def test_the_script_from_another_folder(tmp_path):
    """Hugging Face has a package called `kernels` that transformers imports: ours must not answer to the bare name."""
    (tmp_path / "own.py").write_text(PLUGIN)
    options = ["--plan", "--plugin", "own.py", "--methods", "own", "--suites", "speed"]
    done = subprocess.run([sys.executable, str(REPO / "run_bench.py"), *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and all(" own" in line for line in done.stdout.splitlines())
    assert str(REPO) not in (tmp_path / "found").read_text() and sorted(f.name for f in tmp_path.iterdir()) == [
        "found",
        "own.py",
    ]


def test_list_from_the_repository_itself():
    done = subprocess.run([sys.executable, "run_bench.py", "--list"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("methods:", "minference", "suites:", "fidelity", "models:", "smollm2-135m"))
