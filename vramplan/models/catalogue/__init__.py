"""Checkpoints whose configs come with vramplan: one JSON each, and an index of them all.

A file is named after its id, "/" written as "__", so that looking one up opens one file.
`index.json` holds what a listing shows (id, params, model_type); `python -m
vramplan.models.catalogue.index` writes it anew from the files, and a test holds them equal.

A file's keys: `id`; `params_meta`, the parameters of the model that transformers builds from
`config`, tied ones once; `source`, where the config was copied from; `confidence` and `note`,
where there is something to say; `config`, as in the checkpoint's config.json.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
INDEX = FOLDER / "index.json"

# Only such a name is ever turned into a file name: nothing that could leave the folder.
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Entry(NamedTuple):
    """One line of the index. `params` counts parameters, tied ones once."""

    id: str
    params: int
    model_type: str

    @property
    def name(self) -> str:
        """The id without its organization."""
        return self.id.partition("/")[2]


class Checkpoint(NamedTuple):
    """One bundled checkpoint; the fields are the file's keys."""

    id: str
    config: dict[str, Any]
    params_meta: int
    source: str
    confidence: str | None = None
    note: str | None = None


@lru_cache(maxsize=1)
def entries() -> tuple[Entry, ...]:
    """Every bundled checkpoint, by id without regard to case; reads the index, not the files."""
    return tuple(Entry(**line) for line in json.loads(INDEX.read_text(encoding="utf-8")))


def load(model_id: str) -> Checkpoint | None:
    """The bundled checkpoint of this id, without regard to case; None if there is none.

    Every call returns a config of its own, which the caller may change.
    """
    if not _ID.fullmatch(model_id):
        return None
    found = _read(file_name(model_id))
    if found is not None:
        return found
    folded = model_id.lower()
    for entry in entries():
        if entry.id.lower() == folded:
            return _read(file_name(entry.id))
    return None


def named(name: str) -> tuple[str, ...]:
    """The ids whose name after the organization is `name`, without regard to case."""
    folded = name.lower()
    return tuple(entry.id for entry in entries() if entry.name.lower() == folded)


def search(query: str) -> tuple[Entry, ...]:
    """The checkpoints that hold every word of `query` in their id or model_type."""
    words = query.lower().split()
    return tuple(
        entry
        for entry in entries()
        if all(word in entry.id.lower() or word in entry.model_type.lower() for word in words)
    )


def similar(name: str, limit: int = 3) -> tuple[str, ...]:
    """The ids that look most like `name`, the most alike first; for error messages."""
    from difflib import get_close_matches  # only an error pays for this import

    by_folded: dict[str, list[str]] = {}
    for entry in entries():
        key = entry.id if "/" in name else entry.name
        by_folded.setdefault(key.lower(), []).append(entry.id)
    # The same name under another organization is as good as a match.
    found = list(named(name.rpartition("/")[2]))
    for key in get_close_matches(name.lower(), by_folded, n=limit, cutoff=0.6):
        found += by_folded[key]
    return tuple(dict.fromkeys(found))[:limit]


def file_name(model_id: str) -> str:
    """The name of the file that holds `model_id`."""
    return model_id.replace("/", "__") + ".json"


def _read(name: str) -> Checkpoint | None:
    try:
        text = (FOLDER / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Checkpoint(**json.loads(text))
