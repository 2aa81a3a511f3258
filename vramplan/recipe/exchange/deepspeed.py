"""The key `deepspeed` that other tools' files have: a ds_config.json, or its contents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vramplan.errors import UserError
from vramplan.recipe.ds_merge import merged
from vramplan.recipe.exchange.keys import Keys


def with_deepspeed(keys: Keys, fields: dict[str, Any], folder: str) -> dict[str, Any]:
    """`fields` with what the ds_config says, a path being looked for here and in `folder`."""
    given = keys.take("deepspeed")
    if not given:
        return fields
    if isinstance(given, Mapping):
        values, warnings = merged(given, fields, {})
    elif isinstance(given, str):
        values, warnings = merged(_found(given, folder, keys.name), fields, {})
    else:
        raise UserError(f"{keys.name}: deepspeed is {given!r}: it must be a file, or a table")
    keys.warnings += warnings
    return values


def _found(given: str, folder: str, name: str) -> Path:
    # Tools are started at the root of their repository; the file may lie some folders below it.
    beside = Path(folder).absolute()
    for place in (Path(), beside, *beside.parents):
        if (place / Path(given).expanduser()).is_file():
            return place / Path(given).expanduser()
    raise UserError(
        f"{name}: deepspeed: there is no file {given!r}, here or above {name}: put the "
        "ds_config.json where it says, or take the line out and say --zero"
    )
