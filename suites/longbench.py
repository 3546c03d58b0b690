"""LongBench (Bai et al. 2023, arXiv 2308.14508) and its length-balanced LongBench-E, scored as the authors' repository does."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..methods.spec import first_line
from .base import Cell, Score, register_suite
from .corpora import HUB_TIMEOUT_S
from .generation import Example, GenerationSuite

METRICS = {  # the authors' metric of every task, by the name that lm-evaluation-harness gives it too
    "narrativeqa": "qa_f1_score",
    "qasper": "qa_f1_score",
    "multifieldqa_en": "qa_f1_score",
    "multifieldqa_zh": "qa_f1_zh_score",
    "hotpotqa": "qa_f1_score",
    "2wikimqa": "qa_f1_score",
    "musique": "qa_f1_score",
    "dureader": "rouge_zh_score",
    "gov_report": "rouge_score",
    "qmsum": "rouge_score",
    "multi_news": "rouge_score",
    "vcsum": "rouge_zh_score",
    "trec": "classification_score",
    "triviaqa": "qa_f1_score",
    "samsum": "rouge_score",
    "lsht": "classification_score",
    "passage_count": "count_score",
    "passage_retrieval_en": "retrieval_score",
    "passage_retrieval_zh": "retrieval_zh_score",
    "lcc": "code_sim_score",
    "repobench-p": "code_sim_score",
}
BALANCED = (  # the tasks of LongBench-E
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot prompts: a model goes on with further examples
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")
# Where the harness's prompts (0.4.13) differ from the authors' config/dataset2prompt.json: how they end, and the empty line
# between the examples and the question.
ENDINGS = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}
EMPTY_LINE = ("triviaqa", "samsum")


class LongBenchData(GenerationSuite):
    """Base of the suites whose examples are the authors' files: from the hub, or from the folder --longbench-data."""

    options = (*GenerationSuite.options, "longbench_data")
    cut_middle = True
    hub: ClassVar[tuple[str, str]]  # data set, file in it

    @staticmethod
    def names(task: str) -> tuple[str, ...]:
        """What a task's file may be called in the folder, the first that exists is read."""
        raise NotImplementedError

    @staticmethod
    def example(task: str, number: int, record: Mapping[str, Any]) -> Example:
        """Raises: KeyError, TypeError or ValueError for a record that is not one of the benchmark's."""
        raise NotImplementedError

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        folder = options.get("longbench_data")
        return [str(path) for name in cls.names(task) if folder and (path := Path(folder).expanduser() / name).is_file()][:1]

    @classmethod
    @functools.lru_cache(maxsize=2)  # every method of a plan asks for the same task in turn
    def load(cls, task: str, folder: str | None) -> tuple[list[Example], str]:
        """All examples of a task in the file's order, and the hub's commit ("" for a folder).

        Raises: ValueError when the hub cannot be reached, the folder has no file for the task, or a record is malformed.
        """
        if folder:
            found, revision = cls.files(task, {"longbench_data": folder}), ""
            if not found:
                raise ValueError(f"--longbench-data {folder} has no data for {task}: none of {', '.join(cls.names(task))}")
            path = Path(found[0])
        else:
            path, revision = _download(*cls.hub)
        examples: list[Example] = []
        for place, record in _records(path, task):
            try:
                examples.append(cls.example(task, len(examples), record))
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else first_line(error)
                raise ValueError(f"{place} is not a record of {task}: {reason}") from error
        if not examples:
            raise ValueError(f"{path} has no record of {task}")
        return examples, revision

    def examples(self, model: Any, cell: Cell) -> list[Example]:
        examples, revision = self.load(cell.task, cell.option("longbench_data"))
        self.notes |= {"data_revision": revision} if revision else {}
        return examples


def _download(repository: str, name: str) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # One short question first: a download retries for half a minute without a network.
        revision = HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S).sha
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision)), str(revision)
    except Exception as error:  # the hub library raises many kinds of network, name and disk errors
        raise ValueError(
            f"cannot read {name} of data set {repository!r} from the hub; offline, use --longbench-data FOLDER "
            f"({first_line(error)})"
        ) from error


def _records(path: Path, task: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of a .jsonl file, of the task's in a .zip archive, or of the list in a .json file."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = archive.read(f"data/{task}.jsonl").decode()
        else:
            content = path.read_text(encoding="utf-8")
        listed = json.loads(content) if path.suffix == ".json" else None
    except (UnicodeDecodeError, zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {task} from {path}: {first_line(error)}") from error
    if path.suffix == ".json":
        if not isinstance(listed, list):
            raise ValueError(f"{path} is not a list of records")
        yield from ((f"{path}, record {number}", record) for number, record in enumerate(listed, 1))
        return
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also cut inside strings, at U+2028 and others
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error


def text(record: Mapping[str, Any], name: str) -> str:
    """A field that must be text. Raises: KeyError or TypeError naming it."""
    if not isinstance(record[name], str):
        raise TypeError(f"{name!r} is not text")
    return record[name]


@register_suite
class LongBench(LongBenchData):
    """The 21 tasks of LongBench and, as NAME_e, the 13 of LongBench-E.

    Per example "score" in %: the task's metric, the best over the references. LongBench-E examples also have one of
    score_0_4k, score_4_8k and score_8k, by their length in words: the authors report those three means.
    """

    name = "longbench"
    tasks = (*METRICS, *(f"{task}_e" for task in BALANCED))
    hub = ("zai-org/LongBench", "data.zip")

    @staticmethod
    def names(task: str) -> tuple[str, ...]:
        return f"{task}.jsonl", f"data/{task}.jsonl", "data.zip"

    @staticmethod
    def example(task: str, number: int, record: Mapping[str, Any]) -> Example:
        kind = task.removesuffix("_e")
        prompt, max_new_tokens = prompt_format(kind)
        answers = record["answers"]
        about: dict[str, Any] = {"task": task}
        if not isinstance(answers, list) or not answers:
            raise TypeError("'answers' is not a list of texts")
        if METRICS[kind] == "classification_score":
            about["all_classes"] = [str(name) for name in record["all_classes"]]
        if task != kind:
            about["length"] = int(record["length"])
        return Example(
            id=str(number), prompt=prompt.format(context=text(record, "context"), input=text(record, "input")),
            references=tuple(map(str, answers)), max_new_tokens=max_new_tokens, chat=kind not in NO_CHAT, about=about,
        )  # fmt: skip

    def score(self, example: Example, answer: str) -> Iterator[Score]:
        task = example.about["task"]
        value = 100 * task_score(task.removesuffix("_e"), answer, example.references, example.about.get("all_classes"))
        yield Score(task, example.id, "score", value, "%")
        if "length" in example.about:
            yield Score(task, example.id, f"score_{length_bucket(example.about['length'])}", value, "%")


def task_score(task: str, answer: str, references: tuple[str, ...], all_classes: list[str] | None = None) -> float:
    """The authors' metric of `task` (without "_e") in 0..1, the best over the references; an empty answer has 0."""
    if task in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    if not answer:
        return 0.0
    metric = code_similarity if METRICS[task] == "code_sim_score" else getattr(_harness_metrics(), METRICS[task])
    return float(max(metric(answer, reference, all_classes=all_classes) for reference in references))


def length_bucket(words: int) -> str:
    return "0_4k" if words < 4000 else "4_8k" if words < 8000 else "8k"


def code_similarity(answer: str, reference: str, **_: Any) -> float:
    """Edit similarity of the first line that is no comment, in whole percent.

    The harness's function also skips blank lines, and fuzzywuzzy changes its result when python-Levenshtein is installed.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


@functools.cache
def _harness_metrics() -> Any:
    """lm-evaluation-harness's copy of the authors' metrics; all but its code similarity equal the authors'."""
    try:
        with warnings.catch_warnings():  # fuzzywuzzy asks for python-Levenshtein, which nothing here needs
            warnings.simplefilter("ignore")
            import jieba
            from lm_eval.tasks.longbench import metrics
    except ImportError as error:
        raise ValueError(
            f'LongBench needs lm-evaluation-harness and the libraries of its scores: pip install "lm-eval[longbench]" ({error})'
        ) from error
    jieba.setLogLevel(logging.WARNING)
    return metrics


class _TaskFile(yaml.SafeLoader):
    """Reads the harness's task files: names of functions stay text."""


_TaskFile.add_constructor("!function", lambda loader, node: node.value)


@functools.cache
def prompt_format(task: str) -> tuple[str, int]:
    """The authors' prompt of `task` (without "_e") with {context} and {input}, and the number of generated tokens."""
    path = Path(_harness_metrics().__file__).with_name(f"{task}.yaml")
    settings = yaml.load(path.read_text(encoding="utf-8"), _TaskFile)
    prompt = settings["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if task in ENDINGS:
        prompt = prompt.rstrip() + ENDINGS[task]
    if task in EMPTY_LINE:
        prompt = prompt.partition("{context}")[0] + "{context}\n\n{input}"
    return prompt, settings["generation_kwargs"]["max_gen_toks"]
