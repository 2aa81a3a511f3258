"""config.json -> Architecture: the one reader of Hugging Face's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config.llama import llama
from vramplan.models.hf_config.reader import Config

READERS: dict[str, Callable[[Config], Architecture]] = {
    "llama": llama,
}


class UnknownArchitecture(ConfigError):
    """A `model_type` that has no block description."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The figures of a Hugging Face config.

    Raises ConfigError for a missing or malformed key, UnknownArchitecture for a `model_type`
    without a description.
    """
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("the config has no 'model_type', so its architecture is not known")
    if model_type not in READERS:
        raise _unknown(str(model_type))
    return READERS[model_type](Config(config))


def _unknown(model_type: str) -> UnknownArchitecture:
    from vramplan.errors import nearest

    close = nearest(model_type, READERS)
    hint = f" The nearest that is known: {close!r}." if close else ""
    return UnknownArchitecture(
        f"the architecture {model_type!r} is not described in vramplan.{hint} Known: "
        f"{', '.join(sorted(READERS))}. If it is a renamed copy of a known one, set model_type in "
        "a copy of its config.json; CONTRIBUTING.md says how to add a family."
    )
