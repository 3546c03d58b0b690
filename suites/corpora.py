"""Long documents to measure on: embedded, from a file, or streamed from the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..methods.spec import first_line
from .base import Cell, Suite

HUB = {
    # name: (data set, commit); both have splits train and test and a field "text"
    "pg19": ("emozilla/pg19", "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"),
    "proof_pile": ("hoskinson-center/proof-pile", "490b980249446f2f3bd2df3a8cf085d0f2de240a"),
}
# Of a data set that is described by a loading script, which is never run, the files that hold its splits, a JSON object a line.
HUB_LINES = {
    "hoskinson-center/proof-pile": {
        "train": [f"train/proofpile_train_{number}.jsonl.gz" for number in range(21)],
        "test": ["test/proofpile_test.jsonl.gz"],
    }
}
HUB_TIMEOUT_S = 10
SPLITS = {"train": ("train",), "eval": ("eval", "test", "validation")}  # as files name them
PYDOC_CHARS = 48_000  # about 12k tokens: long enough for 8k contexts


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    revision: str = ""  # commit of the hub's data set


def check_corpus(source: str) -> None:
    """Raise ValueError, with the reason, for a source that cannot be read at all; the hub is not asked."""
    if source.startswith("file:"):
        next(read_documents(source, "eval"), None)
    elif source != "pydoc":
        name, at, revision = source.partition("@")
        if Path(source).is_file():
            raise ValueError(f"unknown corpus {source!r}: a file is written file:{source}")
        if name not in HUB and "/" not in name:
            raise ValueError(
                f"unknown corpus {source!r}: one of pydoc, {', '.join(HUB)}, file:PATH (.txt or .jsonl) or a hub data set"
            )
        if at and not revision:
            raise ValueError(f"corpus {source!r} names no revision behind the @")


def corpus_file(source: str) -> str | None:
    """The file on this machine that holds a corpus: its content may change under the same name. None for the hub."""
    if source == "pydoc":  # another Python has other help topics
        spec = importlib.util.find_spec("pydoc_data.topics")
        return spec.origin if spec else None
    return source.removeprefix("file:") if source.startswith("file:") else None


def shortfall(source: str, limit: int | None) -> str:
    """A line for the user where a corpus holds fewer evaluation documents than `limit`, else "". The hub is not asked."""
    if limit is None or corpus_file(source) is None:
        return ""
    held = len(list(itertools.islice(read_documents(source, "eval"), limit)))
    return f"evaluation documents in {source}: {held}, fewer than the limit of {limit}" if held < limit else ""


@functools.lru_cache
def calibration_corpus(source: str) -> str:
    """The corpus itself when it has training documents apart from those evaluated, else the embedded one."""
    if source.startswith("file:"):
        try:
            train = {document.text for document in read_documents(source, "train")}
        except ValueError:
            return "pydoc"
        if any(document.text in train for document in read_documents(source, "eval")):
            return "pydoc"
    return source


def read_documents(source: str, split: str) -> Iterator[Document]:
    """The documents of a corpus in a fixed order.

    Args:
        source: "pydoc" (Python's own help topics), "pg19" or "proof_pile" (streamed from the hub at a pinned commit),
            "file:PATH" (.txt is one document, .jsonl one a line with "text", optionally "id" and "split"), or "org/name" of a
            hub data set with a column "text" (its main branch); "@revision" behind a name of the hub asks for another revision.
        split: "eval" or "train"; a file whose documents carry no split gives all of them for both.

    Raises: ValueError for an unknown source, a missing, empty or malformed file, or an unreachable hub.
    """
    if split not in SPLITS:
        raise ValueError(f"split is 'train' or 'eval', got {split!r}")
    if source == "pydoc":
        return _pydoc(split)
    if source.startswith("file:"):
        return _from_file(Path(source.removeprefix("file:")).expanduser(), split)
    return _from_hub(source, split)


def _pydoc(split: str) -> Iterator[Document]:
    from pydoc_data.topics import topics

    parts: list[str] = []
    number = 0
    for name in sorted(topics):
        parts.append(topics[name])
        if sum(map(len, parts)) >= PYDOC_CHARS:
            if (number % 2 == 0) == (split == "eval"):
                yield Document(f"pydoc{number}", "\n\n".join(parts))
            parts, number = [], number + 1


def _from_file(path: Path, split: str) -> Iterator[Document]:
    if not path.is_file():
        raise ValueError(f"no such corpus file: {path}")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise ValueError(f"a corpus file is .txt or .jsonl, got {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"corpus file is empty: {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus file is not UTF-8 text: {path}") from error
    if path.suffix.lower() == ".txt":
        return iter([Document(path.stem, content)])
    documents = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would also cut inside strings, at U+2028 and others
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"]
            if not isinstance(text, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number} is not a JSON object with a "text"') from error
        documents.append((record.get("split"), Document(str(record.get("id", number)), text)))
    chosen = [d for own_split, d in documents if own_split is None or own_split in SPLITS[split]]
    if not chosen:
        raise ValueError(f"corpus file {path} has no document for split {split!r}")
    return iter(chosen)


def _from_hub(source: str, split: str) -> Iterator[Document]:
    import datasets
    from huggingface_hub import HfApi

    short, _, asked = source.partition("@")
    name, revision = HUB.get(short, (short, "main"))
    options: dict[str, Any] = {"split": "train" if split == "train" else "test", "streaming": True}
    try:
        # One short question: it names the commit, and without a network load_dataset alone retries for half a minute.
        commit = HfApi().dataset_info(name, revision=asked or revision, timeout=HUB_TIMEOUT_S).sha
        if name in HUB_LINES:
            paths = [f"hf://datasets/{name}@{commit}/{path}" for path in HUB_LINES[name][options["split"]]]
            # As lines of text: other fields of these objects have no type that all of them share.
            lines = datasets.load_dataset("text", data_files={options["split"]: paths}, **options)
            records = (json.loads(line["text"]) for line in lines)
        else:
            records = iter(datasets.load_dataset(name, revision=commit, **options))
        for number, record in enumerate(records):
            yield Document(str(number), record["text"], str(commit))
    except Exception as error:  # the hub library raises many kinds of network, name and format errors
        raise ValueError(
            f"cannot read data set {name!r} from the hub; offline, use pydoc or file:PATH ({first_line(error)})"
        ) from error


@dataclass(frozen=True)
class Windows:
    """Documents tokenised and truncated."""

    ids: list[tuple[str, list[int]]]  # (document id, token ids)
    too_short: int  # documents skipped because they have fewer tokens than the context
    sha256: str  # of the token ids: tells whether two rows read the same text
    revision: str = ""  # commit of the hub's data set that they come from

    def notes(self) -> dict[str, Any]:
        found = {"documents": len(self.ids), "documents_too_short": self.too_short, "text_sha256": self.sha256}
        return found | ({"data_revision": self.revision} if self.revision else {})


@functools.lru_cache(maxsize=16)
def token_windows(
    tokenizer: Any, source: str, split: str, ctx_len: int, limit: int | None, longest: int | None = None
) -> Windows:
    """The first ctx_len tokens of the first `limit` documents that have as many, special tokens as the tokenizer adds them;
    with `longest` up to that many tokens of each.

    Raises: ValueError when no document is long enough.
    """
    ids: list[tuple[str, list[int]]] = []
    too_short, digest, revision = 0, hashlib.sha256(), ""
    for document in read_documents(source, split):
        revision = document.revision
        tokens = _tokenise(tokenizer, document)[: longest or ctx_len]
        if len(tokens) < ctx_len:
            too_short += 1
            continue
        repeats = sum(name.partition("#")[0] == document.id for name, _ in ids)
        ids.append((f"{document.id}#{repeats + 1}" if repeats else document.id, list(tokens)))
        digest.update(repr(tokens).encode())
        if len(ids) == limit:
            break
    if not ids:
        raise ValueError(f"no document of {source} ({split}) has {ctx_len} tokens; {too_short} are shorter")
    return Windows(ids, too_short, digest.hexdigest()[:16], revision)


@functools.lru_cache(maxsize=32)  # a book is 5 MB of integers
def _tokenise(tokenizer: Any, document: Document) -> tuple[int, ...]:
    return tuple(tokenizer(document.text, verbose=False)["input_ids"])


class CorpusSuite(Suite):
    """Base of the suites that read long documents: the cell's task is the corpus."""

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        return [path] if (path := corpus_file(task)) else []

    def calibration(self, model: Any, cell: Cell, documents: int) -> tuple[str, list[list[int]]]:
        source = calibration_corpus(cell.task)
        try:
            windows = token_windows(model.tokenizer, source, "train", cell.ctx_len, documents)
        except ValueError as error:
            raise ValueError(f'no text to turn the knob on: {error}; a .jsonl may hold some as "split": "train"') from error
        return f"{source} (train)", [ids for _, ids in windows.ids]
