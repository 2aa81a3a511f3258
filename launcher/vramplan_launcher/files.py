"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from vramplan.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Writes beside `path`, then renames: a reader sees the old file or the new one.

    Raises UserError where it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            beside.unlink()
    return path


def write_json(path: Path, document: Any) -> Path:
    """`document` as JSON, whole or not at all."""
    return write_text(path, json.dumps(document, indent=1) + "\n")


def read_json(path: Path, thing: str) -> dict[str, Any]:
    """The table in a JSON file. Raises UserError, which names `thing` and the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {thing} {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{thing} {str(path)!r} is malformed: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{thing} {str(path)!r} holds no table")
    return document
