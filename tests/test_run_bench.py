"""The command: bad input, what it skips, what fails, what a second run computes, and numbers against their definition."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sparsebench import run_bench
from sparsebench.methods import METHODS
from sparsebench.models import MODELS, zoo
from sparsebench.results import Store
from sparsebench.suites import SUITES, corpora

SCRIPT = Path(run_bench.__file__).resolve()
pytestmark = pytest.mark.usefixtures("one_thread", "no_plugins_left")
PLUGIN = '''
from dataclasses import dataclass
from pathlib import Path
import time

from sparsebench.methods import Method, register
from sparsebench.methods.base import dense_attention


@register
@dataclass(frozen=True)
class Own(Method):
    """A method of the user's."""

    name = "NAME"

    def attend(self, q, k, v, ctx):
        BODY
        return dense_attention(q, k, v, ctx.scale)
'''


@pytest.fixture
def no_plugins_left():
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def write_corpus(path, lengths, splits=None):
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcdefgh ", k=length)) for length in lengths]
    rows = [{"id": f"doc{i}", "text": text} for i, text in enumerate(texts)]
    for row, split in zip(rows, splits or ()):
        row["split"] = split
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_plugin(folder, **bodies):
    """One file with a method per name, which runs its line of code and then dense attention."""
    path = folder / "own.py"
    path.write_text("".join(PLUGIN.replace("NAME", name).replace("BODY", body) for name, body in bodies.items()))
    return path


class Bench:
    """The command on the random model and a file, writing to `out`; later options win over these."""

    def __init__(self, model, folder, capsys):
        self.model, self.folder, self.out, self.capsys = str(model), folder, folder / "out", capsys
        self.corpus = write_corpus(folder / "text.jsonl", [300, 290, 280])

    def argv(self, words, *more):
        mine = f"--models {self.model} --corpus file:{self.corpus} --out {self.out}"
        mine += " --device cpu --limit 2 --suites perplexity --ctx 128"
        return [*mine.split(), *words.split(), *map(str, more)]

    def __call__(self, words, *more):
        """(exit status, stdout, stderr without progress bars)"""
        status = run_bench.main(self.argv(words, *more))
        done = self.capsys.readouterr()
        return status, done.out, "\n".join(line for line in done.err.splitlines() if "it/s" not in line and "cell" not in line)

    def start(self, words, *more):
        """The same in a process of its own, where Ctrl-C works also below a shell that had switched it off."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *self.argv(words, *more)], cwd=self.folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def rows(self, **where):
        frame = pd.read_csv(self.out / "results.csv")
        for column, value in where.items():
            frame = frame[frame[column] == value]
        return frame

    def cells(self):
        return {path.name: path.stat().st_mtime_ns for path in (self.out / "cells").glob("*.parquet")}


@pytest.fixture
def bench(model_folder, tmp_path, capsys):
    return Bench(model_folder, tmp_path, capsys)


def check_refused(bench, words, message, *more):
    status, out, err = bench(words, *more)
    assert status == 2 and out == "" and not bench.out.exists()
    assert len(err.splitlines()) == 1 and err.startswith("run_bench: ") and re.search(message, err), err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods dens", "unknown method 'dens'; did you mean dense"),
        ("--suites perplexty", "unknown suite 'perplexty'; did you mean perplexity"),
        ("--models smolm2-135m", "unknown model 'smolm2-135m'; did you mean smollm2-135m"),
        ("--models .", "no model folder"),
        ("--methods a_shape:locl=3", "no field 'locl'; did you mean local"),
        ("--methods a_shape:local=many", "a_shape:local=many is not a whole number"),
        ("--methods minference:vertical=-1", "minference:vertical=-1 is out of range"),
        ("--methods random,random", "listed twice"),
        ("--methods a_shape:local", "a_shape:local has no value"),
        ("--ctx 8q", "lengths are 2 tokens or more, written 512, 8k or 1m, got '8q'"),
        ("--ctx 0", "'0'"),
        ("--ctx 99999999999999m", "'99999999999999m'"),
        ("--out=", "--out names no folder"),
        ("--density 2", "--density takes numbers .*'2'"),
        ("--density nan", "'nan'"),
        ("--limit 0", "--limit must be at least 1"),
        ("--limit many", "--limit: invalid int value: 'many'"),
        ("--dtype fp8", "--dtype: invalid choice"),
        ("--nonsense", "--nonsense"),
        ("--methods ,", "nothing to run"),
        ("--corpus ,", "nothing to run"),
        ("--corpus pg20", "unknown corpus 'pg20'"),
        ("--corpus file:missing.txt", "no such corpus file"),
        ("--suites ruler --tasks niah_singel_1", "unknown task 'niah_singel_1'; did you mean niah_single_1"),
        ("--suites ruler,longbench --tasks niah_single_1", "--tasks names none of longbench"),
        ("--suites perplexity --tasks niah_single_1", "--tasks is of longbench, longbench2, ruler, speed, none of which"),
        ("--suites speed --tasks kernel_64", "unknown task 'kernel_64'; did you mean kernel_64x64"),
        ("--suites ruler,speed --tasks kernel_64x64", "--tasks names none of ruler"),
        ("--suites speed --qkv missing.safetensors", "--qkv missing.safetensors: no such file"),
        ("--suites ruler --haystack file:missing.txt", "no such corpus file"),
        ("--suites perplexity --qkv missing.safetensors", "--qkv is of speed, none of which is in --suites perplexity"),
        ("--suites fidelity --chat-template", "--chat-template is of longbench, longbench2, ruler, none of which"),
        ("--suites longbench --longbench-data missing", "--longbench-data missing is not a folder"),
        ("--ctx 256,1k --stride 512", "--stride 512 is larger than the context of 256 tokens"),
        ("--ctx 1k --stride 2k", "--stride 2048 is larger than the context of 1024 tokens"),
        ("--stride 0", "lengths are 2 tokens or more, written 512, 8k or 1m, got '0'"),
        ("--methods a_shape --versus seer", "--versus seer is none of --methods: a_shape"),
        ("--plugin missing.py", "no such plug-in file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(bench, words, message):
    check_refused(bench, words, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b'{"text": 3}\n', "jsonl:1 is not"), (b"\n\n", "no document")],
)
def test_bad_corpus_files(bench, content, message):
    bench.corpus.write_bytes(content)
    check_refused(bench, "", message)


def test_corpora_that_are_no_documents(bench, tmp_path):
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    check_refused(bench, "--corpus", "a corpus file is .txt or .jsonl", f"file:{tmp_path / 'array.json'}")
    check_refused(bench, "--corpus", "a file is written file:", bench.corpus)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "registers no method"),
        ("\n1 / 0", r"ZeroDivisionError: division by zero \(own.py, line 2\)"),
        ("def", "SyntaxError"),
        ("import sys\nsys.exit(0)", r"SystemExit: 0 \(own.py, line 2\)"),
    ],
)
def test_bad_plugins(bench, tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    check_refused(bench, "--plugin", message, tmp_path / "own.py")


def test_a_plugin_cannot_end_the_command(bench, tmp_path):
    leaves = '    name = "own"\n\n    def __post_init__(self):\n        raise SystemExit(0)\n'
    plugin = write_plugin(tmp_path, own="pass")
    plugin.write_text(plugin.read_text().replace('    name = "own"\n', leaves))
    check_refused(bench, "--methods own --plugin", r"SystemExit: 0 \(own.py, line", plugin)
    plugin.write_text(plugin.read_text().replace("def __post_init__(self)", "@property\n    def note(self)"))
    status, out, _ = bench("--methods own,random --plugin", plugin)
    assert (
        status == 1 and "SystemExit: 0 (own.py, line" in out and set(bench.rows(status="ok")["method"]) == {"dense", "random"}
    )


def test_no_gpu(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refused(bench, "--device cuda", "no CUDA device")


def test_bad_output_folders(bench):
    bench.out.mkdir()
    (bench.out / "schema.json").write_text('{"schema": 999}')
    status, _, err = bench("--methods dense")
    assert status == 2 and "schema 999" in err and os.listdir(bench.out) == ["schema.json"]
    status, _, err = bench("--methods dense --out", bench.corpus)
    assert status == 2 and "is not a folder" in err
    status, _, err = bench("--methods dense --out /proc/nothing/here")
    assert status == 2 and "/proc/nothing/here" in err and len(err.splitlines()) == 1


def test_plan_and_list_run_nothing(bench, tmp_path):
    status, out, _ = bench("--plan --suites perplexity,speed --methods a_shape,random --density 0.25,0.5 --ctx 128,2k")
    assert status == 0 and not bench.out.exists()
    lines = out.splitlines()
    assert len([line for line in lines if line.startswith("perplexity")]) == 2 * (1 + 2 * 2)  # dense once a context
    assert all(("skipped" in line) == (" 2048 " in line or line.startswith("speed")) for line in lines)
    plugin = write_plugin(tmp_path, own="pass")
    assert "  own            A method of the user's." in bench("--list --plugin", plugin)[1].splitlines()
    METHODS.pop("own")
    status, out, _ = bench("--list")
    assert status == 0 and not bench.out.exists()
    assert {*METHODS, *SUITES, *MODELS} <= {line.split()[0] for line in out.splitlines()}
    assert all(len(line.split()) > 2 for line in out.splitlines() if line.startswith("  "))


def test_short_documents_are_skipped_and_counted(bench):
    write_corpus(bench.corpus, [100, 300, 90, 250])
    status, out, _ = bench("--methods dense --ctx 128,512,200")
    assert status == 1
    for ctx in (128, 200):
        rows = bench.rows(ctx_len=ctx, metric="nll")
        assert list(rows["example"]) == ["doc1", "doc3"] and set(rows["prov_documents_too_short"]) == {2}
    (failed,) = bench.rows(status="failed").itertuples()
    assert failed.ctx_len == 512 and re.search(r"no document of file:\S+ \(eval\) has 512 tokens; 4 are shorter", failed.reason)
    assert failed.reason in out


def test_a_limit_beyond_the_corpus_is_said_once_before_the_run(bench):
    words = "--methods dense,random --suites perplexity,fidelity,speed --limit"
    for limit, said in ((4, 1), (3, 0)):
        status, out, _ = bench(f"{words} {limit}")
        assert status == 0 and out.count(f"evaluation documents in file:{bench.corpus}: 3, fewer than the limit of 4\n") == said
        assert out.startswith("evaluation documents in") == bool(said)


def test_what_cannot_apply_is_a_row_with_the_reason(bench, monkeypatch):
    words = "--methods a_shape --suites perplexity,speed --ctx 128,2k"
    status, out, _ = bench(words)
    assert status == 0
    reasons = {(row.suite, row.ctx_len): row.reason for row in bench.rows(status="skipped").itertuples()}
    too_long = f"{bench.model} is limited to 1024 tokens"
    assert reasons["perplexity", 2048] == too_long and too_long in out
    assert "needs a CUDA device" in reasons["speed", 128] and reasons["speed", 128] == reasons["speed", 2048]
    assert reasons["speed", 128] in out and set(bench.rows(status="ok")["ctx_len"]) == {128}
    assert not bench.rows()["metric"].astype(str).str.contains("_ms").any()
    # Of a hub model only loading tells how long its context is.
    monkeypatch.setattr(zoo, "describe", lambda name: (None, ""))
    assert bench("--methods dense --ctx 2k --out", bench.folder / "hub")[0] == 0
    assert set(pd.read_csv(bench.folder / "hub" / "results.csv")["reason"]) == {too_long}


def test_a_whole_run(bench):
    words = "--methods dense a_shape:init=16,local=64 oracle:density=0.5 random:density=0.5 --ctx 128,256"
    words += " --suites perplexity,fidelity"
    status, out, _ = bench(words)
    assert status == 0 and set(bench.rows()["status"]) == {"ok"}
    board = pd.read_csv(bench.out / "leaderboard.csv").set_index("method")
    tokenizer, model = AutoTokenizer.from_pretrained(bench.model), LlamaForCausalLM.from_pretrained(bench.model)
    for ctx in (128, 256):
        texts = [json.loads(line)["text"] for line in bench.corpus.read_text().splitlines()][:2]
        ids = torch.stack([tokenizer(text, return_tensors="pt")["input_ids"][0, :ctx] for text in texts])
        with torch.no_grad():
            log_p = model(ids).logits[:, :-1].double().log_softmax(-1)
        expected = (-log_p.gather(-1, ids[:, 1:, None]).mean()).exp()
        assert board[f"perplexity file:{bench.corpus} {ctx}"]["dense"] == pytest.approx(float(expected), rel=1e-5)
        recall = board[f"fidelity file:{bench.corpus} recall {ctx}"]
        assert recall["dense"] == pytest.approx(1, abs=1e-5) and 1 > recall["oracle"] > recall["random"] > 0
        pairs = sum(min(i + 1, 64 + min(16, max(i - 63, 0))) for i in range(ctx))
        exact = {"dense": 1.0, "a_shape": pairs / (ctx * (ctx + 1) / 2)}
        for method, density in exact.items():
            rows = bench.rows(method=method, ctx_len=ctx)
            assert rows[["density", "density_min", "density_max"]].to_numpy() == pytest.approx(density)
            heads = rows[rows["metric"] == "density"]
            assert len(heads) == 2 * 2 * 4 and heads["value"].to_numpy() == pytest.approx(density)
        assert bench.rows(method="random", ctx_len=256)["density"].to_numpy() == pytest.approx(0.5, abs=0.05)
        assert f"{float(expected):.4g}" in out
    assert len(list(bench.out.glob("*.png"))) == 2 and "data:image/png" in (bench.out / "report.html").read_text()

    before = bench.cells()
    assert len(before) == 16
    status, out, _ = bench(words)
    assert status == 0 and "16 of 16 cells are done already" in out and bench.cells() == before
    status, out, _ = bench(words + " --ctx 128,256,64")
    after = bench.cells()
    assert "16 of 24 cells are done already" in out and len(after) == 24 and after.items() > before.items()
    status, out, _ = bench("--overwrite " + words)
    assert status == 0 and "done already" not in out and all(bench.cells()[name] > before[name] for name in before)


def test_iso_density_rows(bench):
    words = "--methods dense a_shape:init=0 random:block=16 --suites perplexity,fidelity --density 0.25 --ctx 256"
    status, out, _ = bench(words)
    assert status == 0, out
    rows = bench.rows()
    assert set(rows.loc[rows["method"] == "dense", "density"]) == {1.0}
    turned = rows[rows["method"] != "dense"]
    assert set(turned["density_target"]) == {0.25} and turned["density"].to_numpy() == pytest.approx(0.25, rel=0.02)
    assert set(turned["prov_knob"].str.split("=").str[0]) == {"local", "density"}
    assert set(turned["prov_calibrated_on"]) == {"pydoc (train)"}  # this file has no documents apart from those evaluated


def test_the_plug_ins_fields_may_be_lists(bench, tmp_path):
    fields = "heads: list = field(default_factory=lambda: [1, 2])\n    density: float = 1.0\n    knob = 'density'\n    name"
    plugin = write_plugin(tmp_path, own="ctx.mask = METHODS['random'](density=self.density, block=16).select(q, k, ctx)")
    code = plugin.read_text().replace("    name", f"    {fields}", 1).replace("import dataclass", "import dataclass, field")
    plugin.write_text(code.replace("import Method,", "import METHODS, Method,"))
    status, out, _ = bench("--methods own --suites perplexity,fidelity --density 0.4 --ctx 256 --plugin", plugin)
    assert status == 0, out
    assert bench.rows(method="own")["density"].to_numpy() == pytest.approx(0.4, rel=0.03)


def test_no_text_to_calibrate_on(bench):
    write_corpus(bench.corpus, [40, 300], ["train", "eval"])
    assert bench("--methods random --density 0.4 --ctx 256")[0] == 1
    (reason,) = bench.rows(method="random")["reason"]
    assert "no text to turn the knob on" in reason and "1 are shorter" in reason and '"split": "train"' in reason


@pytest.mark.parametrize("splits", [None, ["train", "eval", "eval"], ["train", None, "eval"]])
def test_never_calibrates_on_what_is_evaluated(bench, monkeypatch, splits):
    write_corpus(bench.corpus, [300] * 3, splits)
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    texts = [tokenizer(json.loads(line)["text"])["input_ids"][:128] for line in bench.corpus.read_text().splitlines()]
    seen, real = [], run_bench.capture_layers
    monkeypatch.setattr(run_bench, "capture_layers", lambda model, ids: seen.append(list(ids)) or real(model, ids))
    assert bench("--methods random --density 0.4")[0] == 0
    apart = splits is not None and None not in splits
    assert seen and (seen == [texts[0]] if apart else not any(ids in texts for ids in seen))
    (source,) = set(bench.rows(method="random")["prov_calibrated_on"])
    assert source == (f"file:{bench.corpus} (train)" if apart else "pydoc (train)")


def test_failures_are_rows_and_the_run_goes_on(bench, tmp_path):
    plugin = write_plugin(
        tmp_path, breaks='raise RuntimeError("no luck\\nsecond line")', nans='v = v * float("nan")',
        leaves="raise SystemExit(0)", wrong="return v", works="pass",
    )  # fmt: skip
    words = "--methods breaks,nans,leaves,wrong,works --suites perplexity,fidelity --plugin"
    status, out, _ = bench(words, plugin)
    assert status == 1
    ok = bench.rows(status="ok")
    assert set(zip(ok["suite"], ok["method"])) == {("perplexity", "dense"), ("perplexity", "works"), ("fidelity", "works")}
    failed = bench.rows(status="failed").set_index(["suite", "method"])["reason"]
    assert failed["perplexity", "breaks"] == failed["fidelity", "breaks"] == "RuntimeError: no luck (own.py, line 18)"
    assert failed["perplexity", "nans"] == "nll of example 'doc0' of file:" + str(bench.corpus) + " is nan"
    assert "is nan" in failed["fidelity", "nans"] and len(failed) == 8
    assert failed["perplexity", "leaves"].startswith("SystemExit: 0 (own.py, line ")
    assert failed["perplexity", "wrong"].startswith("ValueError: wrong: attend() must return [")
    assert " (attend() in own.py, line " in failed["perplexity", "wrong"]
    for (suite, method), reason in failed.items():  # told when it fails, and below the tables
        assert any(line.startswith(f"FAILED {suite}") and f" {method}: {reason}" in line for line in out.splitlines())
        assert out.count(f"{suite} 128 failed: {reason} ({method})") == 1
    assert set(pd.read_csv(bench.out / "leaderboard.csv")["method"]) == {"dense", "works"}
    status, out, _ = bench(f"--versus breaks {words}", plugin)
    assert status == 1 and "3 of 11 cells are done already" in out  # failed cells are tried again
    assert "perplexity 128 failed: RuntimeError: no luck" in out  # with nothing to compare with there are tables all the same


def test_tables_are_of_the_newest_version_of_a_plug_in(bench, tmp_path):
    words = "--methods own,random --versus own --suites perplexity --limit 2 --plugin"
    means = []
    for body in ("pass", "v = -v"):
        status, out, _ = bench(words, write_plugin(tmp_path, own=body))
        assert status == 0 and ("rows of earlier versions of own are in results.csv alone" in out) == (body != "pass")
        table = pd.read_csv(bench.out / "leaderboard.csv").set_index("label")
        assert sorted(table.index) == ["dense", "own", "random"]
        means.append(table.loc["random", next(c for c in table if c.endswith("diff_versus"))])
    assert means[0] != means[1]
    assert bench.rows(method="own")["params"].nunique() == 2


def test_seer_without_a_gate_says_how_to_get_one(bench):
    status, out, _ = bench("--methods seer,random")
    (reason,) = bench.rows(method="seer")["reason"]
    assert status == 1 and reason in out
    assert "no trained gate ships for tiny" in reason and "seer:gate=PATH" in reason and "seer.distill" in reason
    assert set(bench.rows(method="random")["status"]) == {"ok"}


def test_the_content_of_files_is_part_of_the_identity(bench, tmp_path, monkeypatch):
    def keys(words, *more):
        return {job.method.name: job.cell.key for job in run_bench.plan(run_bench.parse(bench.argv(words, *more)))}

    plugin = write_plugin(tmp_path, own="pass")
    first = keys("--methods own,dense --plugin", plugin)
    assert keys("--methods own,dense --plugin", plugin) == first
    write_plugin(tmp_path, own="k = k * 2")
    second = keys("--methods own,dense --plugin", plugin)
    assert second["own"] != first["own"] and second["dense"] == first["dense"]
    write_corpus(bench.corpus, [300, 290, 281])
    third = keys("--methods own,dense --plugin", plugin)
    assert all(third[name] != second[name] for name in third)
    topics = [keys("--methods dense --corpus pydoc")]
    with monkeypatch.context() as patched:  # another Python has other topics
        patched.setattr(corpora, "corpus_file", lambda source: str(bench.corpus) if source == "pydoc" else None)
        topics.append(keys("--methods dense --corpus pydoc"))
    assert topics[0] != topics[1]
    gate = tmp_path / "gate"
    gate.mkdir()
    (gate / "config.json").write_text("{}")
    weights = []
    for content in (b"1", b"2"):
        (gate / "gate.safetensors").write_bytes(content)
        weights.append(keys(f"--methods seer:gate={gate},dense"))
    assert weights[0]["seer"] != weights[1]["seer"] and weights[0]["dense"] == weights[1]["dense"] == third["dense"]


def test_ctrl_c_before_anything_is_finished(bench, tmp_path):
    plugin = write_plugin(tmp_path, stops="raise KeyboardInterrupt")
    status, _, err = bench("--methods stops --suites fidelity --plugin", plugin)
    assert status == 130 and "goes on from here" in err
    assert bench.cells() == {} and bench.rows().empty and (bench.out / "report.html").exists()


def test_ctrl_c_before_the_folder_exists(bench, tmp_path):
    (tmp_path / "own.py").write_text("raise KeyboardInterrupt")
    status, _, err = bench("--plugin", tmp_path / "own.py")
    assert status == 130 and "interrupted" in err and not bench.out.exists()


def test_ctrl_c_while_the_imports_run(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    child = bench.start("--list")
    assert any("torch" in line for line in child.stderr)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and out == "" and "Traceback" not in err


def blocked_after_two_cells(bench, folder):
    """A run that has finished two of its six cells and hangs in the third until the file `go` is there."""
    plugin = write_plugin(folder, waits="exec(\"while not Path(__file__).with_name('go').exists(): time.sleep(0.01)\")")
    words = "--methods dense,random,waits --ctx 64,128 --plugin"
    child = bench.start(words, plugin)
    deadline = time.monotonic() + 120
    while len(bench.cells()) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.poll() is None, child.communicate()
    return child, (words, plugin)


def test_kill_9_loses_only_the_cell_in_flight(bench, tmp_path):
    child, command = blocked_after_two_cells(bench, tmp_path)
    finished = bench.cells()
    assert len(finished) == 2
    status, out, err = bench("--methods dense --ctx 64")
    assert status == 2 and "another run is writing to" in err and out == "" and bench.cells() == finished
    child.kill()
    child.communicate()
    (tmp_path / "go").touch()
    status, out, _ = bench(*command)
    assert status == 0 and "2 of 6 cells are done already" in out
    after = bench.cells()
    assert len(after) == 6 and after.items() > finished.items()
    assert set(bench.rows()["status"]) == {"ok"} and bench.rows()["key"].nunique() == 6


def test_ctrl_c_keeps_what_is_finished(bench, tmp_path):
    child, _ = blocked_after_two_cells(bench, tmp_path)
    finished = bench.cells()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted" in err and "Traceback" not in err
    assert bench.cells() == finished and set(bench.rows()["method"]) == {"dense", "random"}
    assert "perplexity, " in out and (bench.out / "leaderboard.csv").exists()
    with Store(bench.out) as store:  # the lock went with the process
        assert store.frame()["key"].nunique() == 2


def test_turned_knobs_are_kept_for_the_next_run(bench, monkeypatch):
    words = "--methods random:block=16 --density 0.3 --ctx 128 --suites"
    assert bench(f"{words} perplexity")[0] == 0
    turned = []
    real = run_bench.calibrate
    monkeypatch.setattr(run_bench, "calibrate", lambda *args: turned.append(args[1]) or real(*args))
    assert bench(f"{words} fidelity")[0] == 0
    assert not turned
    one, two = (set(bench.rows(method="random", suite=suite)["prov_knob"]) for suite in ("perplexity", "fidelity"))
    assert one == two and len(one) == 1
    assert bench(f"--overwrite {words} fidelity")[0] == 0
    assert turned == [0.3]


def test_rows_say_what_a_density_could_not_be(bench):
    words = "--suites perplexity --density 0.01 --ctx 128 --methods"
    assert bench(f"{words} a_shape:init=64 dilated a_shape:local=1000,init=1000")[0] == 0
    rows = bench.rows(suite="perplexity").groupby("prov_label")["prov_note"].first()
    assert "the nearest that its knob gets to density 0.01 is" in rows["a_shape(init=64)"]
    assert "no knob" in rows["dilated"] and "ran dense" in rows["dilated"]
