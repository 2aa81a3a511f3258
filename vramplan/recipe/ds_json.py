"""JSON as people write it in a ds_config.json: comments and trailing commas are let pass.

DeepSpeed reads a file by hjson (runtime/config.py), transformers and accelerate by json
(HfDeepSpeedConfig). hjson also takes `ture` for a string, and needs a package: here only what can't
hide a slip is tolerated.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vramplan.errors import UserError

_STRING = r'"(?:\\.|[^"\\\n])*"'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")


def loads(text: str, thing: str) -> tuple[dict[str, Any], bool]:
    """The table in `text`, and whether it is more than strict JSON allows.

    Raises UserError, which names `thing`, and the place or the keys that are wrong.
    """
    plain = _COMMA.sub(_blank, _COMMENT.sub(_blank, text))
    try:
        found = json.loads(plain, object_pairs_hook=_once)
    except ValueError as error:
        raise UserError(f"{thing} is malformed: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{thing} holds {found!r}, not a table of settings")
    return found, plain != text


def _blank(match: re.Match[str]) -> str:
    """As many blanks, so that an error's line and column are those of the file."""
    found = match[0]
    return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """DeepSpeed refuses a key that is there twice (dict_raise_error_on_duplicate_keys)."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"there more than once: {', '.join(twice)}")
    return table
