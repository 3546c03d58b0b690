"""One paper, one file. Importing this package registers every method in it."""

import importlib
import pkgutil

from .base import METHODS, LayerContext, Method, register

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "LayerContext", "Method", "register"]
