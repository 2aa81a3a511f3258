"""A table of another tool's keys, taken one by one; what is left is judged by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any, TypeVar

from vramplan.errors import InvalidValue, UnknownName, UserError, nearest
from vramplan.recipe.optimizers import find_optimizer

_T = TypeVar("_T")
_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")
_NOTHING: tuple[Any, ...] = (None, False, "", 0, [], {}, "none", "None", "no")
"""Values by which a key asks for nothing."""
_SHOWN = 40
"""Characters of a value that a warning shows."""


class Keys:
    """The keys of one file. Each that is taken is understood; `finish` speaks of the rest."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.left = dict(values)
        self.name = name
        self.warnings: list[str] = []
        self.quiet: list[str] = []
        self.taken: set[str] = set()

    def warn(self, text: str) -> None:
        """Something of the file that the estimate does not honour."""
        self.warnings.append(f"{self.name}: {text}")

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it stands; null is `default`."""
        self.taken.add(key)
        value = self.left.pop(key, None)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false, as YAML and people write them."""
        value = self.take(key, default)
        if isinstance(value, str):
            word = value.lower()
            value = True if word in _YES else False if word in _NO else value
        if type(value) is not bool:
            raise InvalidValue(f"{self.name}: {key}", value, "true or false")
        return value

    def number(self, key: str, default: _T) -> float | _T:
        """A number; YAML takes 2e-4 for text, as it has no dot."""
        value = self.take(key)
        if value is None:
            return default
        try:
            if isinstance(value, bool) or not isfinite(number := float(value)):
                raise ValueError
            return number
        except (TypeError, ValueError, OverflowError):
            raise InvalidValue(f"{self.name}: {key}", value, "a number") from None

    def count(self, key: str, default: _T) -> int | _T:
        """A whole number of at least 1."""
        value = self.number(key, None)
        if value is None:
            return default
        if value != int(value) or value < 1:
            raise InvalidValue(f"{self.name}: {key}", value, "an integer of at least 1")
        return int(value)

    def text(self, key: str) -> str | None:
        """A text; null and "" are None."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise InvalidValue(f"{self.name}: {key}", value, "a text")
        return value or None

    def table(self, key: str) -> Mapping[str, Any]:
        """Keys with their values, maybe as JSON in a text; null is none."""
        value = self.take(key, {})
        if isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, Mapping):
            raise InvalidValue(f"{self.name}: {key}", value, "a table of keys and values")
        return value

    def choice(self, key: str, choices: Mapping[str, _T], default: _T) -> _T:
        """The meaning of a name among `choices`."""
        value = self.take(key)
        if value is None:
            return default
        if str(value) not in choices:
            raise UnknownName(f"{key} in {self.name}", value, choices)
        return choices[str(value)]

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, or names with commas between."""
        value = self.take(key, ())
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise InvalidValue(f"{self.name}: {key}", value, "a list of names")
        return tuple(str(part).strip() for part in parts if str(part).strip())

    def optimizer(self, key: str, default: str, *, same: Mapping[str, str] | None = None) -> str:
        """transformers' `optim`; one that is not modelled is estimated as AdamW, with a warning."""
        name = str(self.take(key, default))
        name = (same or {}).get(name, name)
        try:
            return find_optimizer(name).name
        except UserError as error:
            closest = error.nearest if isinstance(error, UnknownName) else None
            near = f"; nearest: {closest!r}" if closest else ""
            self.warn(f"{key}: {name} is not modelled: estimated as adamw_torch_fused{near}")
            return "adamw_torch_fused"

    def finish(self, unmodelled: Mapping[str, str], harmless: Iterable[str]) -> None:
        """Judges the keys that nobody took."""
        known = {*harmless, *unmodelled}
        for key, value in self.left.items():
            if key in unmodelled and value not in _NOTHING:
                shown = str(value)
                shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
                self.warn(f"{key}: {shown} is not honoured: {unmodelled[key]}")
            elif key in known:
                if value not in _NOTHING:
                    self.quiet.append(key)
            else:
                close = nearest(key, sorted(known | self.taken))
                near = f"; nearest: {close!r}" if close else ""
                self.warn(f"unknown key {key!r}{near}")
        self.left.clear()


def words(text: str) -> frozenset[str]:
    """Names with blanks between."""
    return frozenset(text.split())


LOGITS_SMALLER = "the loss keeps far less of the logits, and the estimate is high"
OFFLOADED = "activations go to the host, and the estimate is high"
OTHER_KERNEL = "other kernels keep other activations"
MORE_TRAINED = "more is trained than the adapters, and the estimate is low"
OTHER_MODEL = "it changes the model that is trained"
SHARDED = "the estimate has every rank with whole sequences and layers"
