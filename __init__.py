"""sparsebench: compare sparse attention methods on one model, one text and one GPU."""

__version__ = "0.1.0"

from .methods.base import attention, select  # noqa: E402

__all__ = ["attention", "select"]
