"""What lives outside torch's allocator on this machine's cards, as runs here measured it.

CUDA's context and NCCL's buffers depend on card, driver and library versions. Launched runs record
the most that they had (vramplan_launcher.archive); estimates for the same card use it in place of
the constants, and say so. Nothing else of an estimate is ever fitted to runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.hardware.gpu import Gpus

OVERHEADS = "overheads.json"


class Measured(NamedTuple):
    """Bytes on one card."""

    context: int
    """CUDA context, kernels and libraries of a process."""
    nccl: int | None
    """What a process that trains with others has beyond that; None: never measured."""
    source: str
    """Where it is from, for a person."""


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$XDG_DATA_HOME/vramplan, by default under ~/.local/share."""
    home = environ.get("XDG_DATA_HOME") or os.path.join("~", ".local", "share")
    return Path(os.path.expanduser(home)) / "vramplan"


def kind_of(quantization: str | None, zero: bool, world_size: int) -> str:
    """Runs that have the same outside the allocator: "plain", "int8", "zero", "plain-ranks", ..."""
    name = "int8" if quantization == "int8" else "plain"
    name = f"{name}-zero" if zero else name
    return name if world_size == 1 else f"{name}-ranks"


def overhead_of(
    gpus: Gpus | None, quantization: str | None, *, zero: bool = False
) -> Measured | None:
    """Of a card in the catalogue or in this machine; None where no run here measured it.

    `zero`: under DeepSpeed, whose streams and kernels take more.
    """
    if gpus is None or gpus.nominal:
        return None
    path = data_folder() / OVERHEADS
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    return _measured(str(path), changed, gpus.gpu.id, gpus.gpu.name, kind_of(quantization, zero, 1))


@lru_cache(maxsize=64)
def _measured(path: str, changed: int, id_: str, name: str, kind: str) -> Measured | None:
    mine = [entry for entry in _entries(path) if _is(entry, id_, name)]
    alone = [entry for entry in mine if entry["kind"] == kind]
    if not alone:
        return None
    newest = max(alone, key=lambda entry: str(entry["when"]))
    together = [
        entry["outside"]
        for entry in mine
        if entry["kind"] == f"{kind}-ranks" and entry["driver"] == newest["driver"]
    ]
    context = int(newest["outside"])
    runs = newest["runs"]
    return Measured(
        context,
        max(0, max(together) - context) if together else None,
        f"measured here in {runs} run{'' if runs == 1 else 's'}, driver {newest['driver']}, "
        f"torch {newest['torch']}",
    )


def _entries(path: str) -> list[dict[str, Any]]:
    import json

    try:
        with open(path, encoding="utf-8") as file:
            cards = json.load(file)["cards"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # an estimate never fails for a file that it can do without
    names = ("device", "kind", "outside", "driver", "torch", "runs", "when")
    return [e for e in cards if isinstance(e, dict) and all(name in e for name in names)]


def _is(entry: Mapping[str, Any], id_: str, name: str) -> bool:
    """Whether an entry's card, by torch's name of it, is the one asked about."""
    if entry["device"] == name:
        return True
    from vramplan.hardware.catalogue import gpu_by_device_name

    found = gpu_by_device_name(entry["device"], int(entry.get("device_memory") or 0))
    return found is not None and found.id == id_
