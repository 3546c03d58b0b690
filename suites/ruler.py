"""RULER: questions about synthetic long texts, made by lm-evaluation-harness and scored as NVIDIA's repository scores them.

Hsieh et al. 2024 (arXiv 2404.06654). The harness makes longer prompts than asked for where it forgets the answer's start, the
chat template or the generated tokens, and leaves out the worked example of cwe; here all of them are part of the length.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import random
import re
import socket
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from ..methods.spec import first_line
from .base import Cell, NotApplicable, Score, register_suite
from .corpora import HUB_TIMEOUT_S, corpus_file, read_documents
from .generation import Example, GenerationSuite, encode, wrap

ESSAYS = "baber/paul_graham_essays"  # on the hub; the haystack of RULER's essay tasks
ALL = 500  # examples where there is no limit, as in the harness
SPARE = 4  # examples made beyond the limit: knobs are turned on them
SENTENCE_END = re.compile("(?<=[.!?]) (?=[\"'\u201c\u2018A-Z])")


@dataclass(frozen=True)
class Family:
    """A generator of the harness. uncounted: tokens it leaves out of a prompt's length at most, besides the answer's start."""

    module: str
    sampler: str  # its function that is told how many examples to make
    new_tokens: int
    uncounted: int = 2  # where two texts meet, their tokens may differ
    counts_start: bool = True  # whether the text that it measures ends with the answer's start


FAMILIES = {
    "niah": Family("niah_utils", "generate_samples", 128, counts_start=False),
    # The worked example gets new names after it was measured: 14 times three letters, one to three tokens each.
    "vt": Family("vt_utils", "sys_vartrack_w_noise_random", 30, uncounted=32),
    "cwe": Family("cwe_utils", "sys_word_pair_random", 120),
    "fwe": Family("fwe_utils", "sys_kwext", 50, uncounted=52),  # it fills the whole context with the prompt
    "qa": Family("qa_utils", "generate_samples", 32, counts_start=False),
}
MAKERS = {"vt": "get_vt_dataset", "cwe": "get_cw_dataset", "fwe": "fwe_download", "qa_1": "get_squad", "qa_2": "get_hotpotqa"}
ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
OFFLINE_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
LEAST_NOISES, LEAST_WORDS, SHOT_TOKENS = 5, 10, 500  # the harness's own, of vt, cwe and vt's worked example
ESSAY_STEP = 500  # words by which the harness lengthens an essay
FWE_TOKENS = 200  # fewer give it no vocabulary of four words


@register_suite
class Ruler(GenerationSuite):
    """The 13 tasks of RULER. score: references found in the answer, all of them counted, one enough for qa, times 100.

    Answers are compared as NVIDIA's scripts/eval does: case-insensitive substrings. harness_score is lm-evaluation-harness's
    own 0 to 1, which differs for qa: the part of the aliases that is found.
    """

    name = "ruler"
    tasks = (
        *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    )
    options = (*GenerationSuite.options, "haystack")

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        path = corpus_file(options.get("haystack") or ESSAYS) if task in ESSAY_TASKS else None
        return [path] if path else []

    def examples(self, model: Any, cell: Cell) -> list[Example]:
        made = make_examples(model.tokenizer, replace(cell, method="", params={}, density=None))
        if cell.task in ESSAY_TASKS:
            self.notes |= {"haystack": cell.option("haystack") or ESSAYS, "sentences": "punkt" if _has_punkt() else "simple"}
            self.notes |= {"data_revision": revision} if (revision := made[0].about["data_revision"]) else {}
        return made

    def score(self, example: Example, answer: str) -> Iterator[Score]:
        common, task, length = _harness("common_utils"), example.about["task"], example.about["ctx_len"]
        (text,) = common.postprocess_pred([answer])  # control characters become line ends, as in NVIDIA's
        hits = [reference.lower() in text.lower() for reference in example.references]
        qa = task.startswith("qa")
        yield Score(task, example.id, "score", 100.0 * (any(hits) if qa else sum(hits) / len(hits)), "%")
        process = common.process_results_part if qa else common.process_results
        ratio = process({"max_length": length, "outputs": list(example.references)}, [answer])[str(length)]
        yield Score(task, example.id, "harness_score", ratio, "ratio")


@functools.lru_cache(maxsize=32)  # every method of a plan is asked the same questions
def make_examples(tokenizer: Any, cell: Cell) -> list[Example]:
    """cell.limit examples (500 without a limit) and a few more, the same ones for equal cells in any order and process.

    Raises: NotApplicable when the task cannot fill cell.ctx_len; ValueError when a download or the haystack is missing.
    """
    family = FAMILIES[cell.task.split("_")[0]]
    words, revision = _haystack(tokenizer, cell) if cell.task in ESSAY_TASKS else ([], "")
    module = _harness(family.module)
    with tqdm(desc=f"making {cell.task} {cell.ctx_len}", leave=False, unit=" texts") as bar:
        meter = Meter(tokenizer, family, bool(cell.option("chat_template")), bar)
        with _quiet(), _random_state(module, cell.seed), _changed(*_changes(module, family, cell, meter, words)):
            _check_room(module, cell, family, meter)
            try:
                rows = getattr(module, MAKERS.get(cell.task, cell.task))(max_seq_lengths=[cell.ctx_len])["test"].to_list()
            except ValueError as error:
                if "Could not generate any" in str(error):
                    raise NotApplicable(f"{cell.task} does not fit into {cell.ctx_len} tokens") from error
                raise
    _check_rows(rows, cell)
    about = {"task": cell.task, "ctx_len": cell.ctx_len, "data_revision": revision}
    return [
        Example(str(row["index"]), row["input"], tuple(row["outputs"]), family.new_tokens, row["gen_prefix"], about=about)
        for row in rows
    ]


def _check_rows(rows: list[dict], cell: Cell) -> None:
    """Raise NotApplicable where not one step by which texts are lengthened fits into the context, or the answers do not."""
    words = statistics.median(len(row["input"].split()) for row in rows)
    least = ESSAY_STEP if cell.task in ESSAY_TASKS else 0
    if words < least or statistics.median(row["length"] for row in rows) < cell.ctx_len / 2:
        raise NotApplicable(f"{cell.task} adds text in steps that are too large for {cell.ctx_len} tokens")
    missing = any(answer not in row["input"] for row in rows for answer in row["outputs"])
    if missing and not cell.task.startswith("qa"):  # some of those questions are answered yes or no
        raise NotApplicable(f"{cell.task} has no room for its answers in {cell.ctx_len} tokens")


class Meter:
    """Stands in for the tokenizer of a generator and counts what the model will be given, chat template included.

    The answer's start, where the measured text lacks it, is taken to be as long as the question, the last line: it repeats
    the question or is shorter.
    """

    def __init__(self, tokenizer: Any, family: Family, chat: bool, bar: tqdm):
        self.tokenizer, self.family, self.bar = tokenizer, family, bar
        around = len(encode(tokenizer, wrap(tokenizer, "a", "b", chat))) - len(
            encode(tokenizer, wrap(tokenizer, "a", "b", False))
        )
        self.extra = family.uncounted + around

    def count(self, text: str) -> int:
        texts = [text] if self.family.counts_start else [text, text.rpartition("\n")[2]]
        return sum(len(self.tokenizer(part, verbose=False)["input_ids"]) for part in texts) + self.extra

    def __call__(self, text: str) -> SimpleNamespace:
        self.bar.update()
        return SimpleNamespace(input_ids=range(self.count(text)))


def _changes(module: Any, family: Family, cell: Cell, meter: Meter, words: list[str]) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced in the generators while they run: by themselves they load a tokenizer by name, with the code that comes
    along, and make 500 examples."""
    sampler: Any = getattr(module, family.sampler)
    make: Any = getattr(module, "generate_input_output", None)
    count = cell.limit + SPARE if cell.limit else ALL

    def limited(*args: Any, **settings: Any) -> list[dict]:
        wanted = 1 if settings.get("num_samples") == 1 else count  # vt makes its worked example in the same way
        return sampler(*args, **settings | {"num_samples": wanted})

    def vt(noises: int, *args: Any, **settings: Any) -> tuple:
        while True:
            with contextlib.suppress(IndexError):  # two variables were drawn with the same name
                return make(max(noises, LEAST_NOISES), *args, **settings)  # with no noise it would try for ever

    def cwe(number: int, length: int) -> tuple:
        shot, text, answer = make(max(number, LEAST_WORDS), length)
        return "", f"{shot}\n{text}", answer

    yield module, "get_tokenizer", lambda name: meter
    yield module, family.sampler, limited
    if words:
        yield module, "get_haystack", lambda type_haystack: words
    if words and not _has_punkt():
        yield _harness("prepare_niah"), "cached_sent_tokenize", SENTENCE_END.split
    if cell.task in ("vt", "cwe"):
        yield module, "generate_input_output", vt if cell.task == "vt" else cwe
    if cell.task.startswith("qa"):
        yield module, "download_json", functools.partial(_download, cell.task)


def _check_room(module: Any, cell: Cell, family: Family, meter: Meter) -> None:
    """Raise NotApplicable where a generator would try for ever, since its smallest prompt is too long."""
    least, tokens = 0, meter.count
    if cell.task == "vt":
        shot = tokens(module.generate_input_output(LEAST_NOISES, 1, 4, is_icl=True)[0]) + family.new_tokens
        if shot > SHOT_TOKENS:
            raise NotApplicable(f"vt's worked example may have {SHOT_TOKENS} tokens and takes {shot} of this tokenizer")
        least = tokens(module.generate_input_output(2 * LEAST_NOISES, 1, 4)[0]) + SHOT_TOKENS
    elif cell.task == "cwe":
        least = tokens(module.generate_input_output(LEAST_WORDS, cell.ctx_len)[1])
    elif cell.task == "fwe":
        least = max(tokens(module.TEMPLATE), FWE_TOKENS) - family.new_tokens
    if least + family.new_tokens > cell.ctx_len:
        raise NotApplicable(f"{cell.task} needs {least + family.new_tokens} tokens at least, not {cell.ctx_len}")


def _haystack(tokenizer: Any, cell: Cell) -> tuple[list[str], str]:
    """The words that needles are hidden in, and their revision on the hub.

    Raises: ValueError when they cannot be read, or are too few for cell.ctx_len.
    """
    source = cell.option("haystack") or ESSAYS
    try:
        documents = list(read_documents(source, "train" if source == ESSAYS else "eval"))
        words = " ".join(document.text for document in documents).split()
    except ValueError as error:
        if source != ESSAYS:
            raise
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(
            f"{cell.task} hides its needles in essays from the hub, which did not come: give any long text with --haystack "
            f"file:PATH, or take {', '.join(OFFLINE_TASKS)} ({first_line(reason)})"
        ) from error
    tokens = len(encode(tokenizer, " ".join(words[: cell.ctx_len])))
    if tokens < cell.ctx_len:
        raise ValueError(f"the haystack {source} has {tokens} tokens, too few for a context of {cell.ctx_len}")
    return words, documents[0].revision


def _download(task: str, url: str) -> Any:
    import requests

    try:
        response = requests.get(url, timeout=HUB_TIMEOUT_S)
        response.raise_for_status()
        return response.json()
    except (requests.RequestException, ValueError) as error:
        raise ValueError(
            f"{task} asks about documents from {url}, which did not come: take {', '.join(OFFLINE_TASKS)} ({first_line(error)})"
        ) from error


@functools.cache
def _harness(module: str) -> Any:
    """A module of the harness's RULER. Importing the needles' one lists six million words, and asks the network for punkt."""
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(HUB_TIMEOUT_S)
        with _quiet():
            return importlib.import_module(f"lm_eval.tasks.ruler.{module}")
    except ImportError as error:
        raise ValueError('RULER needs lm-evaluation-harness: pip install "lm-eval[ruler,longbench]"') from error
    finally:
        socket.setdefaulttimeout(timeout)


def _has_punkt() -> bool:
    """Without nltk's punkt, sentences end at their punctuation; needles stand between sentences."""
    try:
        return bool(_harness("prepare_niah").nltk.data.find("tokenizers/punkt_tab"))
    except LookupError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _random_state(module: Any, seed: int) -> Iterator[None]:
    """The generators draw from the global states, cwe also from one of its own: seeded inside, as they were afterwards."""
    own = getattr(module, "RNG", random.Random())
    states: tuple[Any, ...] = random.getstate(), np.random.get_state(), own.getstate()
    for start in (random.seed, np.random.seed, own.seed):
        start(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        own.setstate(states[2])


@contextlib.contextmanager
def _changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    saved = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
