"""Recipes in files: JSON to read and write, TOML to read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vramplan.errors import InvalidValue, UserError
from vramplan.recipe.recipe import Recipe


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a .json or .toml file: a table of Recipe's fields, with a table `lora` in it.

    Raises UserError, which names the file and, for a malformed one, the place in it.
    """
    file = Path(path)
    parse = {".json": _parse_json, ".toml": _parse_toml}.get(file.suffix.lower())
    if parse is None:
        raise InvalidValue("recipe file", str(path), "a .json or .toml file")
    try:
        values = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"can't read recipe file {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # both parsers' errors, and bytes that are no UTF-8
        raise UserError(f"recipe file {str(path)!r} is malformed: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe file {str(path)!r} holds {values!r}, not a table of fields")
    return Recipe.from_dict(values)


def write_recipe(recipe: Recipe, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Writes `recipe` as JSON, and says where. An existing file is left alone unless `overwrite`.

    Raises UserError if the file exists or can't be written.
    """
    file = Path(path)
    if file.suffix.lower() != ".json":
        raise InvalidValue("recipe file", str(path), "a .json file (TOML is only read)")
    text = json.dumps(recipe.to_dict(), indent=2) + "\n"
    try:
        with file.open("w" if overwrite else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise UserError(f"{str(path)!r} exists already, and is not overwritten unasked") from error
    except OSError as error:
        raise UserError(f"can't write recipe file {str(path)!r}: {error.strerror}") from error
    return file


def _parse_json(text: str) -> Any:
    return json.loads(text)


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
