"""Data for a run: rows of a file, a folder or a `datasets` id, as sequences of one fixed length.

`DataSpec` says what is wanted and is light; `load_data` needs torch, datasets and a tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vramplan_launcher.data.spec import DataSpec

if TYPE_CHECKING:
    from vramplan_launcher.data.load import Counts, Datasets, load_data

__all__ = ["Counts", "DataSpec", "Datasets", "load_data"]


def __getattr__(name: str) -> Any:
    if name not in ("Counts", "Datasets", "load_data"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("vramplan_launcher.data.load"), name)
