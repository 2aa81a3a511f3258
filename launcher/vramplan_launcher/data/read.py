"""Rows from files, saved folders and `datasets` ids, through the `datasets` library."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vramplan.errors import UnknownName, UserError
from vramplan_launcher.data.spec import FORMATS, SUFFIXES, DataSpec, format_of

_SAVED = ("dataset_info.json", "dataset_dict.json")
"""By either a folder of `save_to_disk` is told."""
NAMED = {"text": "text", "prompt": "prompt", "completion": "completion", "messages": "messages"}
"""What a column is called where the user names none."""


def read_rows(spec: DataSpec, source: str, split: str, cache: Path) -> Any:
    """`source` as a `datasets.Dataset`; what it converts is kept under `cache`.

    Raises UserError: no such file, dataset or split, no network, or a file that can't be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        saved = any((path / name).is_file() for name in _SAVED)
        rows = _saved(path, split) if saved else _loaded(source, spec.subset, split, cache)
    elif path.is_file():
        rows = _file(path, spec, cache)
    elif _looks_like_a_file(source):
        raise UserError(f"no data file {source!r}{_beside(path)}")
    else:
        rows = _loaded(source, spec.subset, split)
    if len(rows) == 0:
        raise UserError(f"data {source!r} has no rows")
    return rows if spec.limit is None else rows.select(range(min(spec.limit, len(rows))))


def columns_of(spec: DataSpec, columns: Sequence[str], source: str) -> tuple[str, ...]:
    """The columns that are learned: (text,), (prompt, completion) or (messages,).

    Of those by their usual names, conversations come before pairs, and pairs before text.
    Raises UserError where there is none of them.
    """
    if spec.text_column:
        wanted: list[tuple[str, ...]] = [(spec.text_column,)]
    elif spec.messages_column:
        wanted = [(spec.messages_column,)]
    elif spec.pair:
        wanted = [
            (spec.prompt_column or NAMED["prompt"], spec.completion_column or NAMED["completion"])
        ]
    else:
        wanted = [(NAMED["messages"],), (NAMED["prompt"], NAMED["completion"]), (NAMED["text"],)]
    for names in wanted:
        if all(name in columns for name in names):
            return names
    if len(wanted) == 1:
        missing = next(name for name in wanted[0] if name not in columns)
        raise UnknownName(f"column of data {source!r}", missing, columns)
    raise UserError(
        f"data {source!r} has no column text, messages, or prompt and completion: its columns are "
        f"{', '.join(columns)}. Name the one to learn (--text-column, --prompt-column and "
        "--completion-column, or --messages-column)"
    )


def _looks_like_a_file(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or bool(format_of(source))


def _beside(path: Path) -> str:
    from vramplan.errors import nearest

    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    names = sorted(entry.name for entry in path.parent.iterdir() if format_of(entry.name))
    close = nearest(path.name, names)
    return f"; nearest: {close!r}" if close else ""


def _file(path: Path, spec: DataSpec, cache: Path) -> Any:
    from datasets import Dataset

    kind = spec.format or format_of(path.name)
    if kind is None:
        raise UserError(
            f"data file {str(path)!r}: the name ends in none of {', '.join(SUFFIXES)}. Say its "
            f"format: {', '.join(FORMATS)}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"data file {str(path)!r} is empty")
    # A name is a pattern to `datasets`: brackets and stars in it are meant as they stand.
    options: dict[str, Any] = {"cache_dir": str(cache)}
    if kind == "csv":
        # pandas takes "NA", "null" and "None" for missing values; in a text they are words.
        options["keep_default_na"] = False
        if path.name.lower().split(".")[-1 if path.suffix == ".tsv" else -2 :][0] == "tsv":
            options["sep"] = "\t"
    read = {"json": Dataset.from_json, "csv": Dataset.from_csv, "parquet": Dataset.from_parquet}
    try:
        return read[kind](glob.escape(str(path.absolute())), **options)
    except (Exception, StopIteration) as error:
        raise UserError(f"data file {str(path)!r}: {_why(path, kind, cache, error)}") from error


def _why(path: Path, kind: str, cache: Path, error: BaseException) -> str:
    """What is wrong with a file that `datasets` could not read, and in which row."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, UnicodeDecodeError):
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{cause.strerror}, as its rows were written to {str(cache)!r}"
    if kind == "json":
        broken = _broken_line(path)
        if broken:
            return broken
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 ({cause.reason}). Convert it"
    first = _first(cause).removeprefix("Error tokenizing data. C error: ")
    return f"not read as {kind}: {first}"


def not_utf8(source: str, error: UnicodeDecodeError) -> str:
    """Where a file has bytes that are no UTF-8, as far as can be told."""
    path = Path(source).expanduser()
    told = _broken_line(path) if path.is_file() else None
    return told or f"it holds text that is not UTF-8 ({error.reason}). Convert it"


def _broken_line(path: Path) -> str | None:
    """The first line that is no JSON object; None of a file that is not one object a line."""
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return None  # compressed
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            stripped = line.strip().removeprefix(b"\xef\xbb\xbf")
            if number == 1 and stripped.startswith(b"["):
                return None
            if not stripped:
                continue
            try:
                value = json.loads(stripped)
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 ({error.reason}). Convert the file"
            except ValueError as error:
                return f"line {number} is no JSON: {error}"
            if not isinstance(value, dict):
                kind = type(value).__name__
                return f"line {number} is a JSON {kind}, not an object with named columns"
    return None


def _saved(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise UnknownName(f"split of data {str(path)!r}", split, list(found))
    return found[split]


def _loaded(source: str, subset: str | None, split: str, cache: Path | None = None) -> Any:
    """A dataset of the Hub, or a folder of files laid out as one."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    named = f"dataset {source!r}"
    kept = None if cache is None else str(cache)
    try:
        return load_dataset(source, subset, split=split, cache_dir=kept)
    except DatasetNotFoundError as error:
        raise UserError(f"no {named}, on the Hub or as a file here: {_first(error)}") from error
    except (ConnectionError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{named} is not in the local cache, and the Hub can't be reached "
            f"({_first(error)}). If a file is meant, check its path"
        ) from error
    except DatasetGenerationError as error:
        raise UserError(f"{named}: {_first(error.__cause__ or error)}") from error
    except (ValueError, FileNotFoundError) as error:  # an unknown split or configuration; no data
        raise UserError(f"{named}: {_first(error)}") from error


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
