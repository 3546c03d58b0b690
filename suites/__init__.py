"""One question, one file. Importing this package registers every suite in it."""

import importlib
import pkgutil

from .base import SUITES, Cell, Score, Suite, register_suite

HELPERS = ("base", "baselines", "capture", "checks", "corpora", "generation", "inputs", "timing")

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in HELPERS:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SUITES", "Cell", "Score", "Suite", "register_suite"]
