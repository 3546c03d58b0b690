"""The only room that knows transformers: which models there are, and how a method gets inside one."""

from .attach import attach
from .trace import Trace
from .zoo import MODELS, LoadedModel, ModelEntry, describe, load

__all__ = ["MODELS", "LoadedModel", "ModelEntry", "Trace", "attach", "describe", "load"]
