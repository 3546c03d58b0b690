"""What one measurement is (Cell), what it yields (Score), and what a suite must provide to be run on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..methods.base import Method

SCHEMA = 2  # of Cell and of the stored rows; raise it when either changes, so that old results are never mixed with new ones

SUITES: dict[str, type[Suite]] = {}


@dataclass(frozen=True)
class Score:
    """One number of one example. `unit` names the value's unit ("nats", "ms", "%", "tokens"; "" for a plain ratio)."""

    task: str
    example: str
    metric: str
    value: float
    unit: str


@dataclass(frozen=True)
class Cell:
    """The identity of a measurement: every input that changes a number, and nothing else.

    `params` (of the method) and `options` (of the suite) may be given as mappings and are kept as canonical JSON (sorted keys,
    1.0 written as 1), see `settings` and `option`.
    Raises: ValueError when one of them is no JSON object.
    """

    model: str
    revision: str
    method: str
    params: str | Mapping[str, Any]
    suite: str
    task: str
    ctx_len: int  # tokens
    density: float | None  # the target; what was measured is stored beside the scores
    limit: int | None  # examples
    seed: int
    dtype: str
    device: str = ""  # only where the number is a time or a size
    inputs: str = ""  # digest of the files that the suite reads, which can change under the same name
    options: str | Mapping[str, Any] = "{}"  # of the suite, those left at their defaults left out

    def __post_init__(self):
        for name in ("params", "options"):
            given = getattr(self, name)
            value = json.loads(given) if isinstance(given, str) else given
            if not isinstance(value, Mapping):
                raise ValueError(f"{name} must be a JSON object, not {given!r}")
            object.__setattr__(self, name, canonical_json(value))
        if self.density is not None:
            object.__setattr__(self, "density", float(self.density))

    @property
    def settings(self) -> dict[str, Any]:
        """`params` as a dictionary."""
        return json.loads(str(self.params))

    def option(self, name: str) -> Any:
        """One of `options`; None where it was left at its default."""
        return json.loads(str(self.options)).get(name)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the stored file: equal for equal cells of one schema."""
        return hashlib.sha256(canonical_json({**asdict(self), "schema": SCHEMA}).encode()).hexdigest()[:16]


def canonical_json(value: Mapping[str, Any]) -> str:
    """The same text for the same content: sorted keys, no spaces, whole floats as integers.

    Raises: ValueError for NaN, infinities and anything JSON cannot express.
    """

    def plain(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {str(k): plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return int(x) if isinstance(x, float) and x.is_integer() else x

    try:
        return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{dict(value)} cannot be part of a result's identity: {error}") from None


class NotApplicable(Exception):
    """Raised by run() when a cell makes no sense here (a context beyond the model's): stored as skipped, with the message."""


class Suite:
    """Base of all suites. A subclass sets `name` and yields the scores of one cell; one instance serves one cell."""

    name: ClassVar[str]
    attached: ClassVar[bool] = True  # the runner attaches the method around run(); quality suites never see a method
    needs_model: ClassVar[bool] = True  # run() gets a loaded model, else None
    needs_gpu: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()  # what a cell's task may be; a suite without tasks of its own measures on --corpus
    default_tasks: ClassVar[tuple[str, ...]] = ()  # those that are run unless asked for others; all when empty
    options: ClassVar[tuple[str, ...]] = ()  # of the command line: those that change this suite's numbers (True or text)
    default_limit: ClassVar[tuple[int, int]] = (1, 10)  # examples of a cell on a CPU, on a GPU

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}  # what a reader of the rows must know besides the scores: stored as provenance
        self.answers: dict[str, str] = {}  # what the model said, by example, where the suite lets it speak
        self.finished: frozenset[str] = frozenset()  # examples that an interrupted run has scored: not to be scored again
        # To be called when all scores yielded so far belong to whole examples: an interrupted cell goes on from here.
        self.checkpoint: Callable[[], None] = lambda: None

    @classmethod
    def files(cls, task: str, options: Mapping[str, Any]) -> list[str]:
        """Files of this machine that a cell reads besides the model: their content is part of its identity."""
        return []

    @classmethod
    def methods(cls, task: str, options: Mapping[str, Any], asked: list[Method]) -> list[Method]:
        """What is compared in a task: the methods asked for, unless the task takes none."""
        return asked

    @classmethod
    def subject(cls, task: str, options: Mapping[str, Any]) -> tuple[str, str]:
        """(name, revision) of what a suite that needs no model measures on. Raises: ValueError for a bad option."""
        raise NotImplementedError

    def run(self, model: Any, cell: Cell) -> Iterator[Score]:
        """The scores of `cell`. Raises: NotApplicable with the reason when the cell cannot be measured."""
        raise NotImplementedError

    def calibration(self, model: Any, cell: Cell, documents: int) -> tuple[str, list[list[int]]]:
        """(name, token ids of up to `documents` texts) like the cell's, none of which it evaluates: --density turns the
        methods' knobs on them. Raises: ValueError when there are none."""
        raise ValueError(f"{self.name} has no text to turn a knob on")


def register_suite(cls: type[Suite]) -> type[Suite]:
    """Class decorator: make a suite known by its name. Raises: ValueError for a name that is taken."""
    if cls.name in SUITES:
        raise ValueError(f"a suite named {cls.name!r} is registered already")
    SUITES[cls.name] = cls
    return cls
