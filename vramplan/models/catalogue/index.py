"""Writes index.json from the files beside it: `python -m vramplan.models.catalogue.index`."""

from __future__ import annotations

import json
from typing import Any

from vramplan.models.catalogue import FOLDER, INDEX


def index() -> list[dict[str, Any]]:
    """What index.json must hold: a line for each file of the catalogue, by id."""
    files = [path for path in FOLDER.glob("*.json") if path != INDEX]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    lines = [
        {
            "id": model["id"],
            "params": model["params_meta"],
            "model_type": model["config"]["model_type"],
        }
        for model in found
    ]
    return sorted(lines, key=lambda line: str(line["id"]).lower())


def render(lines: list[dict[str, Any]]) -> str:
    """`lines` as JSON, one checkpoint a line, so that a change shows as one line."""
    body = ",\n".join(json.dumps(line) for line in lines)
    return f"[\n{body}\n]\n"


if __name__ == "__main__":
    INDEX.write_text(render(index()), encoding="utf-8", newline="\n")
