"""The local archive of runs, and what they say of this machine's cards. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vramplan.hardware.measured_overheads import OVERHEADS, data_folder, kind_of
from vramplan_launcher.files import read_json, write_json

_LEFT_OUT = ("timeline",)


def folder() -> Path:
    """$XDG_DATA_HOME/vramplan/runs, by default under ~/.local/share."""
    return data_folder() / "runs"


def join(measurement: Mapping[str, Any]) -> Path:
    """Adds a run; what it says of the card beyond the allocator is kept for estimates."""
    document = json.loads(json.dumps(measurement))
    for rank in document["ranks"]:
        for key in _LEFT_OUT:
            rank.pop(key, None)
    for key in ("losses", "seconds_between_steps"):
        document["training"].pop(key, None)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]
    stamp = document["when"].replace(":", "").replace("-", "")
    path = write_json(folder() / f"{stamp}-{document['name']}-{digest}.json", document)
    _learn(document)
    return path


def runs() -> list[dict[str, Any]]:
    """All runs in it, the oldest first; files that can't be read are left out."""
    found = []
    for path in sorted(folder().glob("*.json")):
        try:
            found.append(read_json(path, "archived run"))
        except ValueError:
            continue
    return found


def _learn(document: Mapping[str, Any]) -> None:
    """The most that ended runs had outside the allocator, by card, driver, torch and kind."""
    environment = document["environment"]
    card = environment.get("device")
    pretended = document["job"]["pretend_ranks"]
    sizes = [rank.get("outside_allocator") for rank in document["ranks"]]
    outside = max((size for size in sizes if size), default=0)
    if not card or not outside or pretended or document["outcome"] != "ended":
        return
    path = data_folder() / OVERHEADS
    table: dict[str, Any] = {"schema": 1, "cards": []}
    if path.exists():
        table |= read_json(path, "table of overheads")
    recipe = document["recipe"]
    key = {
        "device": card,
        "device_memory": environment.get("device_memory"),
        "driver": environment.get("driver"),
        "torch": environment.get("torch"),
        "kind": kind_of(
            recipe["quantization"], recipe.get("deepspeed") is not None, recipe["world_size"]
        ),
    }
    entries = table["cards"]
    entry = next((e for e in entries if all(e.get(k) == v for k, v in key.items())), None)
    if entry is None:
        entry = {**key, "outside": 0, "runs": 0}
        entries.append(entry)
    entry["outside"] = max(entry["outside"], outside)
    entry["runs"] += 1
    entry["when"] = document["when"]
    write_json(path, table)


def private() -> bool:
    """Whether the user asked that runs be kept out of it."""
    return bool(os.environ.get("VRAMPLAN_NO_ARCHIVE"))
