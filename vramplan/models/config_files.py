"""Reading a config.json, or saying what was given in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vramplan.errors import ConfigError, ModelNotFound
from vramplan.units import MIB, format_bytes

CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"

# A config is some kilobytes; whatever is larger than this is no config, and is not read.
MAX_CONFIG_SIZE = 16 * MIB

_INSTEAD = "Pass the model's config.json, the folder that holds it, or its Hub id."

# How files that people pass by mistake begin.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file (weights for llama.cpp)", _INSTEAD),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint", _INSTEAD),
    (b"\x80", "a pickled PyTorch checkpoint", _INSTEAD),
    (b"version https://git-lfs", "a git-lfs pointer", "Fetch the file itself with `git lfs pull`."),
    (b"<", "a web page", "Download the file itself: its address has /resolve/, not /blob/, in it."),
)

# JSON files of the same world, by keys that only they have.
_OTHER_JSON: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"weight_map"}), "an index of weight files"),
    (frozenset({"dim", "n_layers"}), "a params.json in the authors' original format"),
    (frozenset({"tokenizer_class"}), "a tokenizer's config"),
    (frozenset({"_diffusers_version"}), "a diffusers config, and no language model's"),
    (frozenset({"schema", "recipe"}), "a plan or an estimate of vramplan's, which --from reads"),
    (frozenset({"zero_optimization"}), "a DeepSpeed config, which --deepspeed reads"),
)

_JSON_NAMES: dict[type, str] = {list: "a list", str: "a string", bool: "a bool", type(None): "null"}

_SHOWN_NAMES = 6


class NoConfig(ModelNotFound):
    """The model was found, but has no config.json: an adapter, GGUF files, an original format."""


def read_config(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The JSON object in `path`; UTF-8, with or without BOM, or UTF-16 as Windows shells write it.

    Raises ConfigError, with file, line and column where JSON breaks off, and NoConfig for an
    adapter's config. `hint`, a sentence on what to do, ends the message of a malformed file.
    """
    value = _parse(path, _read(path), f" {hint}" if hint else "")
    if not isinstance(value, dict):
        kind = _JSON_NAMES.get(type(value), "a number")
        raise ConfigError(f"{path} holds {kind}, where a config.json holds one object: {{…}}")
    if "model_type" not in value:
        _refuse_other_json(path, value)
    return value


def config_in(folder: Path) -> Path:
    """The config.json of `folder`.

    Raises NoConfig, which says what the folder holds instead, and ConfigError if it can't be read.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        if CONFIG_NAME in names:
            return folder / CONFIG_NAME
        below = [Path(name, CONFIG_NAME) for name in names]
        nested = [path for path in below if os.path.isfile(folder / path)]
    except OSError as error:
        raise ConfigError(f"{folder} can't be read: {error.strerror or error}") from None
    if ADAPTER_CONFIG_NAME in names:
        raise_adapter(str(folder), read_adapter(folder / ADAPTER_CONFIG_NAME))
    raise NoConfig(f"{folder} has no config.json{_what_it_is(names, nested)}")


def read_adapter(path: Path) -> Mapping[str, Any]:
    """The adapter_config.json at `path`, empty if it can't be read: it only serves a message."""
    try:
        value = _parse(path, _read(path), "")
    except ConfigError:
        return {}
    return value if isinstance(value, dict) else {}


def raise_adapter(where: str, adapter: Mapping[str, Any]) -> NoReturn:
    """Raise NoConfig for a peft adapter, naming the base model that its config names."""
    base = adapter.get("base_model_name_or_path")
    step = f"its base model: {base}" if base else "the model that it was trained on"
    raise NoConfig(f"{where} is a peft adapter, and no model of its own. Pass {step}")


def _what_it_is(names: list[str], nested: list[Path]) -> str:
    """What a folder without a config.json seems to be, and the next step; ends its sentence."""
    if not names:
        return ": it is empty"
    if nested:
        return f", but {nested[-1]} lies below it: pass that folder"
    if "model_index.json" in names:
        return ": it is a diffusers pipeline, and no language model"
    if any(name.endswith(".gguf") for name in names):
        return f": it holds GGUF files, which are for inference. {_INSTEAD}"
    if "params.json" in names:
        return (
            ": params.json is the authors' original format. Pass the Hub id of the model in "
            "transformers' format (the repository's name often ends in -hf)"
        )
    shown = ", ".join(names[:_SHOWN_NAMES])
    rest = len(names) - _SHOWN_NAMES
    return f"; in it: {shown}{f' and {rest} more' if rest > 0 else ''}. {_INSTEAD}"


def _read(path: Path) -> bytes:
    """The bytes of `path`, of which no more than a config can have are ever read."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
            _refuse_other_formats(path, head)
            data = head + file.read(MAX_CONFIG_SIZE)
            size = max(path.stat().st_size, len(data))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    if len(data) > MAX_CONFIG_SIZE:
        raise ConfigError(
            f"{path} has {format_bytes(size)}: a config.json has some kilobytes. {_INSTEAD}"
        )
    if not data.strip():
        raise ConfigError(f"{path} is empty: it should hold a model's config")
    return data


def _refuse_other_formats(path: Path, head: bytes) -> None:
    for signature, what, step in _SIGNATURES:
        if head.lstrip().startswith(signature):
            raise ConfigError(f"{path} is {what}, not a config.json. {_beside(path) or step}")
    # safetensors: the length of its JSON header in 8 bytes, little-endian, then that header.
    if head[5:9] == b"\0\0\0{" or path.suffix == ".safetensors":
        step = _beside(path) or _INSTEAD
        raise ConfigError(f"{path} is a safetensors file (weights), not a config.json. {step}")


def _refuse_other_json(path: Path, value: Mapping[str, Any]) -> None:
    if "peft_type" in value:
        raise_adapter(str(path), value)
    for keys, what in _OTHER_JSON:
        if keys <= value.keys():
            raise ConfigError(f"{path} is {what}, not a config.json. {_beside(path) or _INSTEAD}")


def _beside(path: Path) -> str:
    """Where a config.json lies in the folder of the file that was given instead of it."""
    config = path.parent / CONFIG_NAME
    return f"Pass {config}, which lies beside it." if config.is_file() and config != path else ""


def _parse(path: Path, data: bytes, hint: str) -> object:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text: the byte at {error.start} is not {error.encoding}.{hint}"
        ) from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
            raise ConfigError(
                f"{where}: the JSON breaks off ({error.msg}): the file is truncated.{hint}"
            ) from None
        raise ConfigError(f"{where}: malformed JSON: {error.msg}.{hint}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5,000 digits
        raise ConfigError(f"{path} is no config: {error}.{hint}") from None
