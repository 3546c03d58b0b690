"""Methods from text: `seer,minference:vertical=1000,slash=6096` -> instances."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import sys
import traceback
import typing
from pathlib import Path
from typing import Any

from .base import METHODS, Method

PLUGIN = "sparsebench_plugin_"  # how the modules of plug-ins are named
MOST_TOKENS = 2**40


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known ones, or all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def words_of(parts: list[str]) -> list[str]:
    """The words of command-line arguments, separated by commas or spaces, each once."""
    return list(dict.fromkeys(filter(None, re.split(r"[,\s]+", " ".join(parts)))))


def parse_density(word: str) -> float:
    """A target density. Raises: ValueError outside (0, 1]."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"--density takes numbers in (0, 1], got {word!r}")
    return value


def parse_tokens(text: str) -> int:
    """A length in tokens: "512", "8k" = 8192, "1m". Raises: ValueError for anything else."""
    match = re.fullmatch(r"(\d+)([km]?)", text.lower())
    tokens = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]] if match else 0
    if not 2 <= tokens <= MOST_TOKENS:
        raise ValueError(f"lengths are 2 tokens or more, written 512, 8k or 1m, got {text!r}")
    return tokens


def build(name: str, params: dict[str, Any]) -> Method:
    """A method from its name and its params(); entries that are no fields (hashes) are passed over, and whole numbers become
    floats again where JSON lost the point.

    Raises: ValueError for an unknown method or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    cls: Any = METHODS[name]
    hints = typing.get_type_hints(cls)
    values = {f.name: params[f.name] for f in dataclasses.fields(cls) if f.init and f.name in params}
    for field, value in values.items():
        if type(value) is int and float in (kinds := _options(hints.get(field))) and int not in kinds:
            values[field] = float(value)
    return cls(**values)


def parse_methods(text: str) -> list[Method]:
    """Methods of a command line: names separated by commas or spaces, `NAME:field=value` sets hyper-parameters, `all` is every
    method that prefills, as its authors set it.

    Raises: ValueError for an unknown method or field, a value of the wrong type or out of range, or a method named twice.
    """
    specs: list[str] = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        if "=" in part and ":" not in part.split("=")[0]:
            if not specs:
                raise ValueError(f"{part!r} sets a field of no method; write NAME:{part}")
            specs[-1] += ("," if ":" in specs[-1] else ":") + part
        elif part == "all":
            specs += sorted(name for name, cls in METHODS.items() if "prefill" in cls.phases and name not in specs)
        else:
            specs.append(part)
    methods = [_parse_one(spec) for spec in specs]
    for i, method in enumerate(methods):
        if method in methods[:i]:
            raise ValueError(f"method {specs[i]!r} is listed twice")
    return methods


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its text, with the line of a plug-in that it came from: what fits into a row or
    a terminal."""
    places = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(PLUGIN)
    ]
    return "".join([f"{type(error).__name__}: {error}".strip().splitlines()[0], *places[-1:]])


def load_plugin(path: str) -> set[str]:
    """Run a Python file that registers methods; returns their names. Raises: ValueError when it is none or fails."""
    if not Path(path).is_file():
        raise ValueError(f"no such plug-in file: {path}")
    spec = importlib.util.spec_from_file_location(PLUGIN + Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"a plug-in is a Python file (.py), got {path}")
    for name in [name for name, cls in METHODS.items() if cls.__module__ == spec.name]:
        del METHODS[name]  # of an earlier command of this process
    before = set(METHODS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that calls sys.exit() must not decide how the command ends
        raise ValueError(f"plug-in {path}: {first_line(error)}") from error
    if set(METHODS) == before:
        raise ValueError(f"plug-in {path} registers no method: put @register above a Method")
    return set(METHODS) - before


def label(method: Method) -> str:
    """The method as a reader of a table wants it: its name and the fields that differ from the defaults."""
    default, params = type(method)().params(), method.params()
    changed = [f"{f.name}={params[f.name]}" for f in dataclasses.fields(method) if params[f.name] != default[f.name]]  # type: ignore[arg-type]
    return f"{method.name}({', '.join(changed)})" if changed else method.name


def _parse_one(spec: str) -> Method:
    name, _, fields = spec.partition(":")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    cls: Any = METHODS[name]
    hints = {f.name: typing.get_type_hints(cls).get(f.name, str) for f in dataclasses.fields(cls) if f.init}
    values = {}
    for item in filter(None, fields.split(",")):
        field, equals, value = item.partition("=")
        if field in hints and not equals:
            raise ValueError(f"{name}:{field} has no value; write {name}:{field}=VALUE")
        if field not in hints:
            raise ValueError(f"{name} has no field {field!r}; {nearest(field, hints) if hints else 'it has none'}")
        try:
            values[field] = _parse_value(value, hints[field])
        except ValueError:
            raise ValueError(f"{name}:{field}={value} is not {_describe(hints[field])}") from None
    return cls(**values)


def _options(hint: Any) -> list[Any]:
    return [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names.get(t, "text") for t in _options(hint))


def _parse_value(text: str, hint: Any) -> Any:
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    kinds = _options(hint)
    if bool in kinds and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    raise ValueError(text)
