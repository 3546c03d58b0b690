"""Settings of every head that were searched for a model: their file, the methods that read it, the command that writes it."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, ModelSpec
from .spec import parse_tokens


@dataclass(frozen=True)
class PerHead:
    """A checked per-head file: {"model": name, "layers": [[setting or null, ... one per query head] or null, ...], ...}."""

    path: str
    model: str
    layers: list[list[Any] | None]
    sha256: str  # of the file's bytes, 16 digits
    content: dict[str, Any]

    def of_layer(self, layer: int, heads: int) -> list[Any]:
        """The setting of every query head, None where the file has none. Raises: ValueError when the file does not fit."""
        if layer >= len(self.layers):
            raise ValueError(f"{self.path} has {len(self.layers)} layers, the model has a layer {layer}")
        settings = self.layers[layer]
        if settings is None:
            return [None] * heads
        if len(settings) != heads:
            raise ValueError(f"{self.path} has {len(settings)} heads in layer {layer}, the model has {heads}")
        return settings

    def check_model(self, model: ModelSpec, method: str) -> None:
        """Raises: ValueError naming both models when the file was searched for another one."""
        layers = len(self.layers)
        heads = next((len(layer) for layer in self.layers if layer is not None), model.heads)
        if (self.model, layers, heads) != (model.name, model.layers, model.heads):
            raise ValueError(
                f"{self.path} was searched for {self.model} with {layers} layers of {heads} heads, but {model.name} "
                f"has {model.layers} of {model.heads}; search again with python -m sparsebench.methods.{method} "
                f"--model {model.name}"
            )


def load(field: str, path: str, parse: Callable[[Any], Any], form: str) -> PerHead:
    """The per-head file at `path`; its content is read again when it has changed.

    Args: field: "METHOD:FIELD" for the error message;  parse: a setting from its JSON value, ValueError or TypeError for a bad
    one;  form: how a setting is written.
    Raises: ValueError when the file is missing or malformed.
    """
    try:
        return _load(path, Path(path).stat().st_mtime_ns, parse, form)
    except OSError as error:
        raise ValueError(f"{field}={path} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=16)
def _load(path: str, modified_ns: int, parse: Callable[[Any], Any], form: str) -> PerHead:
    raw = Path(path).read_bytes()
    try:
        content = json.loads(raw)
        layers = [layer and [None if head is None else parse(head) for head in layer] for layer in content["layers"]]
        if len({len(layer) for layer in layers if layer is not None}) > 1:
            raise ValueError("its layers differ in heads")
        return PerHead(path, str(content["model"]), layers, hashlib.sha256(raw).hexdigest()[:16], content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is no file of {{"model": name, "layers": [[{form}, ...], ...]}}: {error!r}') from error


class SearchedMethod(Method):
    """A method whose settings can be searched for every head of a model: the field `file_field` names their file, the other
    fields stand in where it is None."""

    needs = "search"
    file_field: ClassVar[str]
    form: ClassVar[str]  # how the file writes one head's setting

    @staticmethod
    def parse_head(head: Any) -> Any:
        """A setting from its JSON value. Raises: ValueError or TypeError for a bad one."""
        raise NotImplementedError

    @property
    def searched(self) -> PerHead | None:
        """The content of the file. Raises: ValueError when it is missing or malformed."""
        path = getattr(self, self.file_field)
        return None if path is None else load(f"{self.name}:{self.file_field}", path, self.parse_head, self.form)

    def of_layer(self, layer: int, heads: int) -> list[Any]:
        """The setting of every query head, None where nothing was searched. Raises: ValueError when the file does not fit."""
        searched = self.searched
        return searched.of_layer(layer, heads) if searched else [None] * heads

    def prepare(self, model: ModelSpec) -> Method:
        """Checks the file against the model. Raises: ValueError when it was searched for another one."""
        if searched := self.searched:
            searched.check_model(model, self.name)
        return self

    def params(self) -> dict[str, Any]:
        searched = self.searched
        return super().params() | ({f"{self.file_field}_sha256": searched.sha256} if searched else {})


@functools.lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor that is kept between calls, because a copy to the GPU waits for it; floats become fp64."""
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float64, device=device)


def command(
    argv: list[str] | None,
    method: str,
    description: str,
    out_help: str,
    search: Callable[..., dict[str, Any]],
    summary: Callable[[dict[str, Any]], str],
    options: dict[str, dict[str, Any]] | None = None,
) -> int:
    """The body of python -m sparsebench.methods.METHOD.

    search(model, spec, documents, **options) returns the content of the per-head file, summary(content) what to print of it;
    options: further arguments by name, as argparse takes them. Returns the exit status, 2 after a ValueError.
    """
    from ..models import zoo  # here, because a method itself needs no model
    from ..suites.corpora import token_windows

    parser = argparse.ArgumentParser(prog=f"python -m sparsebench.methods.{method}", description=description)
    parser.add_argument("--model", required=True, help="name, local folder or hub id, as in run_bench.py")
    parser.add_argument("--data", required=True, help="corpus whose split 'train' is read, e.g. file:PATH")
    parser.add_argument("--ctx", default="8k", help="tokens per document, default 8k")
    parser.add_argument("--out", required=True, type=Path, help=out_help)
    parser.add_argument("--limit", type=int, default=1, help="documents to search over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    for name, settings in (options or {}).items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args(argv)
    try:
        ctx_len = parse_tokens(args.ctx)
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder: name the file")
        loaded = zoo.load(args.model, dtype=getattr(torch, args.dtype), device=args.device)
        loaded.check_length(ctx_len)
        windows = token_windows(loaded.tokenizer, args.data, "train", ctx_len, args.limit)
        documents = [ids for _, ids in windows.ids]
        found = search(loaded.model, loaded.spec, documents, **{name: getattr(args, name) for name in options or {}})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found))
    heads = sum(len(layer) for layer in found["layers"])
    print(f"{heads} heads of {found['model']}: {summary(found)}; in {args.out}")
    return 0
