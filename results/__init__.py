"""Stored results and what is made of them: tables, plots, a report. Never imports torch."""

from .store import Store, provenance

__all__ = ["Store", "provenance"]
