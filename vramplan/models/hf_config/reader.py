"""Reading keys of a Hugging Face config: named errors, class defaults, aliases."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from vramplan.errors import ConfigError

_REQUIRED: Any = object()


class Config:
    """A config.json's keys. What it leaves out takes the default of transformers' class."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.model_type = str(values.get("model_type"))

    def get(self, key: str, default: Any = _REQUIRED, *aliases: str) -> Any:
        """The value of `key` (or an alias); null counts as absent unless no default is given."""
        for name in (key, *aliases):
            value = self.values.get(name)
            if value is not None:
                return value
        if default is _REQUIRED:
            raise ConfigError(
                f"the config of a {self.model_type} model lacks {key!r}, "
                "which its memory depends on"
            )
        return default

    def size(self, key: str, default: Any = _REQUIRED, *aliases: str) -> int:
        """A whole number above zero."""
        value = self.get(key, default, *aliases)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{key} in the config is {value!r}; it must be a whole number above 0"
            )
        return value

    def count(self, key: str, default: Any = _REQUIRED, *aliases: str) -> int:
        """A whole number, zero allowed."""
        value = self.get(key, default, *aliases)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{key} in the config is {value!r}; it must be a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false"""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{key} in the config is {value!r}; it must be true or false")
        return value

    def number(self, key: str, default: float = 0.0, *aliases: str) -> float:
        """A number, such as a dropout probability."""
        value = self.get(key, default, *aliases)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ConfigError(f"{key} in the config is {value!r}; it must be a number")
        return float(value)

    def rotary_fraction(self, default: float = 1.0) -> float:
        """partial_rotary_factor, at the top or among the rope parameters."""
        rope = self.values.get("rope_parameters") or {}
        inner = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
        return self.number("partial_rotary_factor", default if inner is None else float(inner))
