"""Long documents to measure on: embedded, from a file, or streamed from the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import first_line

HUB = {
    # name: (data set, revision); both have splits train and test and a column "text". Proof-Pile's main branch is a loading
    # script, which is never run; the hub's own parquet conversion is read instead.
    "pg19": ("emozilla/pg19", "main"),
    "proof_pile": ("hoskinson-center/proof-pile", "refs/convert/parquet"),
}
HUB_TIMEOUT_S = 10
SPLITS = {"train": ("train",), "eval": ("eval", "test", "validation")}  # as files name them
PYDOC_CHARS = 48_000  # about 12k tokens: long enough for 8k contexts


@dataclass(frozen=True)
class Document:
    id: str
    text: str


def check_corpus(source: str) -> None:
    """Raise ValueError, with the reason, for a source that cannot be read at all; the hub is not asked."""
    if source in ("pydoc", *HUB) or ("/" in source and not source.startswith("file:")):
        return
    if not source.startswith("file:"):
        raise ValueError(
            f"unknown corpus {source!r}: one of pydoc, {', '.join(HUB)}, file:PATH (.txt or .jsonl) or a hub data set"
        )
    next(read_documents(source, "eval"), None)


def corpus_file(source: str) -> str | None:
    """The file on this machine that holds a corpus: its content may change under the same name. None for the hub."""
    if source == "pydoc":  # another Python has other help topics
        spec = importlib.util.find_spec("pydoc_data.topics")
        return spec.origin if spec else None
    return source.removeprefix("file:") if source.startswith("file:") else None


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
        source: "pydoc" (Python's own help topics), "pg19" or "proof_pile" (streamed from the hub), "file:PATH" (.txt is one
            document, .jsonl one a line with "text", optionally "id" and "split"), or "org/name" of a hub data set.
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
    if path.stat().st_size == 0:
        raise ValueError(f"corpus file is empty: {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"corpus file is not UTF-8 text: {path}") from error
    if path.suffix != ".jsonl":
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

    name, revision = HUB.get(source, (source, "main"))
    try:
        # One short question: without a network load_dataset alone retries for half a minute.
        HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        stream = datasets.load_dataset(name, split="train" if split == "train" else "test", revision=revision, streaming=True)
        for number, record in enumerate(stream):
            yield Document(str(number), record["text"])
    except Exception as error:  # the hub library raises many kinds of network, name and format errors
        raise ValueError(
            f"cannot read data set {name!r} from the hub; offline, use pydoc or file:PATH ({first_line(error)})"
        ) from error


@dataclass(frozen=True)
class Windows:
    """Documents tokenised and truncated to one context length."""

    ids: list[tuple[str, list[int]]]  # (document id, ctx_len token ids)
    too_short: int  # documents skipped because they have fewer tokens
    sha256: str  # of the token ids: tells whether two rows read the same text

    def notes(self) -> dict[str, Any]:
        return {"documents": len(self.ids), "documents_too_short": self.too_short, "text_sha256": self.sha256}


@functools.lru_cache(maxsize=16)
def token_windows(tokenizer: Any, source: str, split: str, ctx_len: int, limit: int | None) -> Windows:
    """The first ctx_len tokens of the first `limit` documents that have as many, special tokens as the tokenizer adds them.

    Raises: ValueError when no document is long enough.
    """
    ids: list[tuple[str, list[int]]] = []
    too_short, digest = 0, hashlib.sha256()
    for document in read_documents(source, split):
        tokens = _tokenise(tokenizer, document)[:ctx_len]
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
    return Windows(ids, too_short, digest.hexdigest()[:16])


@functools.lru_cache(maxsize=32)  # a book is 5 MB of integers
def _tokenise(tokenizer: Any, document: Document) -> tuple[int, ...]:
    return tuple(tokenizer(document.text, verbose=False)["input_ids"])
