"""sparsebench: compare sparse attention methods on one model, one text and one GPU."""

__version__ = "0.1.0"

from .methods.base import attention, select

__all__ = ["attention", "select"]
