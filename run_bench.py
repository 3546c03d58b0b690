"""Compare sparse attention methods: parse -> plan -> run the missing cells -> tables.

python run_bench.py --methods seer,minference --ctx 8k,32k,128k
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

# Run as a script, this folder would come first on sys.path and its `kernels` would hide the package that transformers imports.
sys.path[:] = [p for p in sys.path if Path(p or os.curdir).resolve() != Path(__file__).resolve().parent]

if __name__ == "__main__":  # the imports take seconds, and some of them swallow KeyboardInterrupt
    at_ctrl_c = signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
from tqdm import tqdm

from sparsebench.methods import METHODS, Method
from sparsebench.methods.spec import (
    build,
    first_line,
    label,
    load_plugin,
    nearest,
    parse_density,
    parse_methods,
    parse_tokens,
    words_of,
)
from sparsebench.models import zoo
from sparsebench.models.attach import attach
from sparsebench.models.calibrate import calibrate, calibration_facts, capture_layers
from sparsebench.models.trace import Trace
from sparsebench.results import Store, provenance, report
from sparsebench.results.store import digest, source_digest, write_atomically
from sparsebench.results.tables import labelled, newest
from sparsebench.results.text import print_table
from sparsebench.suites import SUITES, Cell, Score, Suite, timing
from sparsebench.suites.base import NotApplicable, canonical_json
from sparsebench.suites.baselines import dense_baselines
from sparsebench.suites.corpora import calibration_corpus, check_corpus, shortfall, token_windows

DEFAULT_METHODS = "dense,seer,minference,a_shape,oracle,random"
# With no arguments: a first look that a laptop finishes in three minutes. At such short contexts the authors' settings of the
# static methods are dense, and SeerAttention's two dense last rows alone are a fifth of all pairs, so densities are made equal.
FIRST_LOOK = ["--methods", DEFAULT_METHODS.replace("seer", "seer:last_dense=0"), "--density", "0.25"]
FIRST_LOOK += ["--suites", "perplexity,fidelity"]
CALIBRATION_DOCUMENTS = 2  # at most; --limit may allow fewer
DEFAULT_SUITES = "perplexity,fidelity,speed"
Text = tuple[tuple[int, ...], ...]  # token ids of documents
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of the plan, with what is needed to run it."""

    cell: Cell
    method: Method
    skip: str = ""  # why it cannot apply
    note: str = ""  # what a reader of its rows must know


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all cells done or skipped, 1 some failed, 2 bad input (nothing written), 130 interrupted."""
    try:
        args = parse(argv)
        if args.list:
            print(listing(args.plugin))
            return 0
        try:
            jobs = plan(args)
        except SystemExit as error:  # of a plug-in's class
            raise ValueError(first_line(error)) from error
        if args.plan:
            print("\n".join(describe(job) for job in jobs))
            return 0
        with Store(args.out, overwrite=args.overwrite) as store:
            status = 0
            try:
                status = run(jobs, store, args)
            except KeyboardInterrupt:
                print("\ninterrupted: the same command goes on from here", file=sys.stderr)
                status = 130
            store.export()
            frame = newest(store.frame(), {(job.cell.model, label(job.method), str(job.cell.params)) for job in jobs})
            table = frame[frame["key"].isin({job.cell.key for job in jobs})]
            done = labelled(table[table["status"] == "ok"])
            versus = args.versus if args.versus in {*done["method"], *done["label"]} else None  # it may have failed everywhere
            if versus != args.versus:
                print(f"--versus {args.versus} finished no cell: nothing is compared with it")
            report.write(frame, store.folder, versus=versus)
        print(print_table(table, versus=versus))
    except ValueError as error:
        print(f"run_bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first cell or in the tables, which the same command makes again
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"\nresults.csv, leaderboard.csv, plots and report.html are in {args.out}")
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # one line, like every other bad input


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="run_bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = functools.partial(parser.add_argument, nargs="+")
    words("--methods", default=[DEFAULT_METHODS], help="names, NAME:field=value,field=value, or all")
    words("--ctx", default=["1k,2k"], help="context lengths in tokens; 8k = 8192")
    words("--models", default=["smollm2-135m"], help="embedded names, local folders or hub ids")
    words("--suites", default=[DEFAULT_SUITES], help=", ".join(SUITES))
    words("--tasks", default=[], help="of ruler, longbench, longbench2 and speed; see the README")
    words("--corpus", default=["pydoc"], help="pydoc, pg19, proof_pile, file:PATH or a hub data set[@REVISION]")
    words("--density", default=[], help="targets: each method's knob is turned to them on other text")
    parser.add_argument("--limit", type=int, default=None, help="documents or examples a cell; each suite has a default")
    parser.add_argument("--chat-template", action="store_true", help="put the model's chat template around the prompts")
    parser.add_argument("--answer-in-prefill", action="store_true", help="also score answers that are read, not generated")
    parser.add_argument("--haystack", default=None, help="file:PATH, the text that ruler hides its needles in")
    parser.add_argument("--longbench-data", default=None, help="folder with the .jsonl files of longbench, longbench2")
    parser.add_argument("--qkv", default=None, help="file of sparsebench.suites.capture: what speed measures on")
    parser.add_argument("--backward", action="store_true", help="speed: the gradients of q, k and v too")
    parser.add_argument("--stride", default=None, help="tokens: perplexity of whole documents in windows that move by this")
    parser.add_argument("--versus", default=None, help="compare with this method too, not with dense alone")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs; the method random has its own, random:seed=1")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="fp32 on a CPU, bf16 on a GPU; speed is always bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="runs/default", help="folder of the results; finished cells in it are not run again")
    parser.add_argument("--plugin", default=None, help="Python file that registers methods of your own")
    parser.add_argument("--plan", action="store_true", help="print the cells and run nothing")
    parser.add_argument("--list", action="store_true", help="print methods, suites and models")
    parser.add_argument("--overwrite", action="store_true", help="run finished cells again")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv or FIRST_LOOK)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")
    if not args.out:
        raise ValueError("--out names no folder")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    args.stride = None if args.stride is None else parse_tokens(args.stride)
    args.dtype = DTYPES[args.dtype or ("fp32" if args.device == "cpu" else "bf16")]
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """All cells of the command, those that share a model and a text side by side. Raises: ValueError for bad input."""
    for cached in (load_model, captured, calibrated, calibration_corpus, digest, token_windows):
        cached.cache_clear()  # files may have changed since an earlier command of this process
    for measured in (dense_baselines, timing.product_tflops):
        measured.cache_clear()  # opponents are timed in the same run
    plugin = load_plugin(args.plugin) if args.plugin else set()
    methods = parse_methods(" ".join(args.methods))
    suites = words_of(args.suites)
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}; {nearest(name, SUITES)}")
    for name in sorted({name for suite in SUITES.values() for name in options_of(suite, args)}):
        check_used(name, [suite for suite in SUITES if name in SUITES[suite].options], suites)
    contexts = [parse_tokens(word) for word in words_of(args.ctx)]
    densities: list[float | None] = [parse_density(word) for word in words_of(args.density)] or [None]
    corpora, models = words_of(args.corpus), words_of(args.models)
    for corpus in filter(None, [*corpora, args.haystack]):
        check_corpus(corpus)
    if args.longbench_data and not Path(args.longbench_data).expanduser().is_dir():
        raise ValueError(f"--longbench-data {args.longbench_data} is not a folder")
    for model in models:
        zoo.describe(model)
    if not (methods and contexts and suites and models and corpora):
        raise ValueError("nothing to run: --methods, --ctx, --suites, --models and --corpus each need at least one value")
    if args.stride and args.stride > min(contexts):
        raise ValueError(
            f"--stride {args.stride} is larger than the context of {min(contexts)} tokens: it would leave text out"
        )
    if args.versus and args.versus not in [name for m in methods for name in (m.name, label(m))]:
        raise ValueError(f"--versus {args.versus} is none of --methods: {', '.join(label(m) for m in methods)}")
    baseline = [] if any(m.name == "dense" for m in methods) else [METHODS["dense"]()]
    tasks = {suite: choose_tasks(suite, corpora, words_of(args.tasks), suites) for suite in suites}
    jobs = []
    for suite, model in _runs(suites, models):
        for task in tasks[suite]:
            for ctx_len in contexts:
                for density in densities:
                    for method in (baseline if SUITES[suite].attached else []) + compared(suite, task, args, methods):
                        jobs.append(make_job(args, suite, model, task, ctx_len, density, method, plugin))
    return list({job.cell.key: job for job in jobs}.values())


def check_used(option: str, having: list[str], suites: list[str]) -> None:
    """Raise ValueError for an option of the suites `having` when none of them is run."""
    if not set(having) & set(suites):
        option = option.replace("_", "-")
        raise ValueError(f"--{option} is of {', '.join(having)}, none of which is in --suites {','.join(suites)}")


def choose_tasks(suite: str, corpora: list[str], asked: list[str], suites: list[str]) -> list[str]:
    """The tasks of one suite. Raises: ValueError for an unknown task and for a suite that is left without any."""
    own, default = SUITES[suite].tasks, SUITES[suite].default_tasks
    known = [task for name in suites for task in SUITES[name].tasks]
    for task in asked:
        check_used("tasks", [name for name in SUITES if SUITES[name].tasks], suites)
        if task not in known:
            raise ValueError(f"unknown task {task!r}; {nearest(task, known)}")
    if not own:
        return corpora
    chosen = [task for task in asked if task in own] or list(default or (() if asked else own))
    if not chosen:
        raise ValueError(f"--tasks names none of {suite}: one of {', '.join(own)}")
    return chosen


def _runs(suites: list[str], models: list[str]) -> Iterator[tuple[str, str]]:
    for model in models:
        yield from ((suite, model) for suite in suites if SUITES[suite].needs_model)
    yield from ((suite, "") for suite in suites if not SUITES[suite].needs_model)


def options_of(suite: type[Suite], args: argparse.Namespace) -> dict[str, Any]:
    """Those of the suite's options that were given."""
    return {name: value for name in suite.options if (value := getattr(args, name)) is not None and value is not False}


def compared(suite: str, task: str, args: argparse.Namespace, methods: list[Method]) -> list[Method]:
    return SUITES[suite].methods(task, options_of(SUITES[suite], args), methods)


def make_job(
    args: argparse.Namespace, suite_name: str, model: str, task: str, ctx_len: int, density: float | None, method: Method,
    plugin: set[str],
) -> Job:  # fmt: skip
    suite, note = SUITES[suite_name], ""
    if method.knob is None and density is not None:
        density, note = None, "" if method.name == "dense" else "no knob: its density is fixed"
    options = options_of(suite, args)
    model, revision = (model, zoo.revision(model)) if suite.needs_model else suite.subject(task, options)
    limit = args.limit or suite.default_limit[args.device == "cuda"]
    params = file_digests(method, model) | method.params() | ({"plugin": digest(args.plugin)} if method.name in plugin else {})
    cell = Cell(
        model=model, revision=revision, method=method.name, params=params,
        suite=suite_name, task=task, ctx_len=ctx_len, density=density, limit=limit if suite.needs_model else None,
        seed=args.seed, dtype=args.dtype if suite.needs_model else "bfloat16",
        device=device_name(args.device) if suite.needs_gpu else "",
        inputs="-".join(digest(path) for path in suite.files(task, options)), options=options,
    )  # fmt: skip
    skip = ""
    longest = zoo.describe(model)[0] if suite.needs_model else None
    if suite.needs_gpu and args.device == "cpu":
        skip = "needs a CUDA device: a time taken on a CPU says nothing about these kernels"
    elif longest is not None and ctx_len > longest:
        skip = f"{model} is limited to {longest} tokens"
    elif "prefill" not in method.phases:
        skip = f"{method.name} is a decode method and has no prefill"
    return Job(cell, method, skip, note)


def run(jobs: list[Job], store: Store, args: argparse.Namespace) -> int:
    """Run the cells that are not done; one that raises becomes a failure row and the run goes on."""
    facts = provenance() | gpu_facts(args.device)
    failed = 0
    todo = [job for job in jobs if not store.done(job.cell)]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} cells are done already")
    reads = [job.cell for job in todo if not (job.skip or SUITES[job.cell.suite].tasks)]
    for corpus, limit in dict.fromkeys((cell.task, cell.limit) for cell in reads):
        if line := shortfall(corpus, limit):
            print(line)
    for job in tqdm(todo, desc="cells", unit="cell"):
        if job.skip:
            store.write(job.cell, [], facts | {"label": label(job.method)}, status="skipped", reason=job.skip)
            continue
        start = time.perf_counter()
        about: dict[str, Any] = {"label": job.cell.method}
        try:
            about |= {"label": label(job.method), "note": job.method.note}
            torch.manual_seed(job.cell.seed)
            scores, density, spread, extra = run_cell(job, args, store)
            notes = [job.note, extra.pop("note", "")]
            if density == 1 and job.method.name != "dense" and job.cell.density != 1:
                own = type(job.method).attend is not Method.attend
                silent = ", or its attend() sets no ctx.mask" if own else ""
                notes.append(f"ran dense: these settings select everything at this length{silent}")
            about |= extra | {"note": "; ".join(filter(None, notes)), "wall_s": time.perf_counter() - start}
            status, reason = store.write(job.cell, scores, facts | about, density, density_range=spread)
        except NotApplicable as error:
            status, reason = store.write(job.cell, [], facts | about, status="skipped", reason=str(error))
        except (Exception, SystemExit) as error:  # whatever a cell raises is its result; the others must still run
            status, reason = store.write(job.cell, [], facts | about, status="failed", reason=first_line(error))
        if status == "failed":
            failed += 1
            tqdm.write(f"FAILED {describe(job)}: {reason}")
    return 1 if failed else 0


def run_cell(
    job: Job, args: argparse.Namespace, store: Store
) -> tuple[list[Score], float | None, tuple[float, float] | None, dict[str, Any]]:
    """Scores, measured density, its range over layers and heads, and facts for the row."""
    cell, suite = job.cell, SUITES[job.cell.suite]()
    if not suite.needs_model:
        scores = list(suite.run(None, cell))
        measured = [score.value for score in scores if score.metric == "density"]
        return scores, measured[0] if measured else None, None, suite.notes
    loaded = load_model(cell.model, cell.dtype, args.device)
    if cell.ctx_len > loaded.max_ctx:  # of a hub model only loading tells
        raise NotApplicable(f"{cell.model} is limited to {loaded.max_ctx} tokens")
    method, facts = job.method, {}
    if cell.density is not None and method.knob is not None:
        assert cell.limit is not None
        source, ids = suite.calibration(loaded, cell, min(CALIBRATION_DOCUMENTS, cell.limit))
        text = tuple(map(tuple, ids))
        folder = Path(args.out) / "knobs"
        model = (cell.model, cell.dtype, args.device)
        method, reached = calibrated(cell.method, str(cell.params), cell.density, model, text, folder, args.overwrite)
        facts = calibration_facts(method, cell.density, reached, source)
    else:
        method = method.prepare(loaded.spec)
    facts["note"] = "; ".join(filter(None, (method.note, facts.get("note"))))
    if not suite.attached:
        scores = list(suite.run(loaded, dataclasses.replace(cell, params=method.params())))
        ran = torch.tensor([score.value for score in scores if score.metric == "density"])
        return scores, float(ran.mean()), (float(ran.min()), float(ran.max())), facts | suite.notes
    with attach(loaded.model, method) as trace:
        scores = resumed(suite, loaded, cell, trace, store)
    facts |= {"kernel": trace.impl, "dense_phases": " ".join(sorted(trace.dense_phases))} | trace.question()
    return scores, trace.mean_density, (float(trace.density.min()), float(trace.density.max())), facts | suite.notes


def resumed(suite: Suite, loaded: zoo.LoadedModel, cell: Cell, trace: Trace, store: Store) -> list[Score]:
    """All scores of a cell: those that an interrupted run kept, then the others, which are kept at every checkpoint."""
    source = source_digest()
    kept = store.checkpoints(cell, source)
    scores = [Score(**score) for record in kept for score in record["scores"]]
    suite.finished = frozenset(score.example for score in scores)
    for record in kept:
        suite.answers |= record["answers"]
    if kept:
        trace.restore(kept[-1]["trace"], loaded.model.device)
    written = len(scores)

    def checkpoint() -> None:
        nonlocal written
        new = [dataclasses.asdict(score) for score in scores[written:]]
        answers = {score["example"]: suite.answers[score["example"]] for score in new if score["example"] in suite.answers}
        store.checkpoint(cell, source, {"scores": new, "answers": answers, "trace": trace.state()})
        written = len(scores)

    suite.checkpoint = checkpoint
    for score in suite.run(loaded, cell):
        scores.append(score)
    if suite.answers:
        store.write_answers(cell, suite.answers)
    return scores


@functools.lru_cache(maxsize=1)
def load_model(name: str, dtype: str, device: str) -> zoo.LoadedModel:
    return zoo.load(name, dtype=getattr(torch, dtype), device=device)


@functools.lru_cache(maxsize=256)
def calibrated(
    name: str, params: str, density: float, model: tuple[str, str, str], text: Text, folder: Path, again: bool
) -> tuple[Method, float]:
    """The method of a cell turned to `density`, ready to run, and the density it has on the calibration text (token ids).

    model is load_model's arguments. `folder` keeps what was found for later runs.
    """
    method, spec = build(name, json.loads(params)), load_model(*model).spec  # from text: a method need not be hashable
    asked = {"method": name, "params": params, "density": density, "model": [*model, zoo.revision(model[0])]}
    asked |= {"text_sha256": hashlib.sha256(repr(text).encode()).hexdigest()[:16], "source": source_digest()}
    kept = folder / f"{hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:16]}.json"
    if kept.exists() and not again:
        with contextlib.suppress(ValueError, KeyError):  # a damaged file is as good as none
            found = json.loads(kept.read_text())
            turned: Any = dataclasses.replace(method, **{str(method.knob): found["value"]})  # type: ignore[type-var]
            return turned.prepare(spec), found["density_reached"]
    method, reached = calibrate(method, density, captured(model, text), lambda m: m.prepare(spec))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, canonical_json(asked | {"value": getattr(method, str(method.knob)), "density_reached": reached}))
    return method, reached


@functools.lru_cache(maxsize=1)
def captured(model: tuple[str, str, str], text: Text) -> list:
    return [layer for ids in text for layer in capture_layers(load_model(*model).model, list(ids))]


def file_digests(method: Method, model: str) -> dict[str, str]:
    """Content of the files that the method reads for the model (a gate): part of a result's identity."""
    return {f"{path.name}_sha256": digest(str(path)) for path in method.files(model) if path.exists()}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def gpu_facts(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"gpu": None, "driver": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


def describe(job: Job) -> str:
    cell = job.cell
    density = "" if cell.density is None else f" density {cell.density:g}"
    skip = f"  (skipped: {job.skip})" if job.skip else ""
    return f"{cell.suite} {cell.model} {cell.task} ctx {cell.ctx_len}{density} {label(job.method)}{skip}"


def listing(plugin: str | None) -> str:
    if plugin:
        load_plugin(plugin)

    def says(cls: type) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    lines = ["methods:", *(f"  {name:14} {says(cls)}" for name, cls in sorted(METHODS.items()))]
    lines += ["suites:", *(f"  {name:14} {says(cls)}" for name, cls in sorted(SUITES.items()))]
    return "\n".join([*lines, "models:", *(f"  {name:14} {zoo.describe(name)[1]}" for name in zoo.MODELS)])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_ctrl_c)
    sys.exit(main())
