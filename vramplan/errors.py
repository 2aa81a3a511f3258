"""Everything that vramplan raises on purpose.

VramplanError                   exit_code 2, shown by the command line without a traceback
└── UserError                   what was asked for is wrong, or can't be had
    ├── UnknownName             a name that is in no table: allowed names and the nearest one
    ├── InvalidValue            a value of the wrong type or out of its range
    ├── ConfigError             a malformed config.json, or one that lacks a key (named)
    ├── IllegalRecipe           a combination that the libraries refuse, with their reason
    └── ModelNotFound           no such model, neither here nor on the Hub
        ├── GatedModel          it exists, and asks for a licence or a token
        ├── Offline             the Hub can't be reached
        └── TimedOut            the Hub did not answer in time

A `UserError` is a `ValueError` too, so code that knows nothing of vramplan can catch it.
Broken invariants of vramplan itself are `assert`s, never one of these.
"""

from __future__ import annotations

from collections.abc import Iterable

# A list of allowed names longer than this is cut: nobody reads sixty names in an error.
_SHOWN = 40  # optimizers are listed, GPUs and models counted
# difflib's similarity, 0 to 1: below this a "nearest" name is noise.
_CUTOFF = 0.5
# A likeness of beginnings counts this much of a likeness of whole names.
_BEGINNING = 0.95


def nearest(value: object, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `value`, without regard to case; None if none does.

    A beginning counts nearly as much as the whole ("adamv" means "adamw_torch", not "ademamix");
    of equals the first wins.
    """
    from difflib import SequenceMatcher  # only an error pays for this import

    wanted = _fold(str(value))
    if not wanted:
        return None
    matcher = SequenceMatcher(b=wanted)
    best, best_score = None, _CUTOFF
    for name in allowed:
        folded = _fold(name)
        for candidate, weight in ((folded, 1.0), (folded[: len(wanted)], _BEGINNING)):
            matcher.set_seq1(candidate)
            score = weight * matcher.ratio()
            if score > best_score:
                best, best_score = name, score
    return best


def _fold(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")


class VramplanError(Exception):
    """Base of all. `exit_code` is what the command line ends with."""

    exit_code = 2


class UserError(VramplanError, ValueError):
    """What was asked for is wrong, or can't be had."""


class UnknownName(UserError):
    """`value` is not one of the names `allowed` for `thing`.

    The message lists the allowed names (or, of a long list, how many there are), names the nearest
    (`closest`, where the caller knows better than the spelling), and ends with `hint`, a sentence
    on what to do next.
    """

    def __init__(
        self,
        thing: str,
        value: object,
        allowed: Iterable[str],
        hint: str = "",
        closest: str | None = None,
    ) -> None:
        self.thing = thing
        self.value = value
        self.allowed = tuple(allowed)
        self.hint = hint
        self.nearest = closest or nearest(value, self.allowed)
        super().__init__(self._message())

    def _message(self) -> str:
        message = f"unknown {self.thing} {self.value!r}"
        if self.allowed and len(self.allowed) <= _SHOWN:
            message += f": allowed are {', '.join(self.allowed)}"
        elif self.allowed:
            message += f": it is none of the {len(self.allowed)} known ones"
        if self.nearest is not None:
            message += f"; nearest: {self.nearest!r}"
        return f"{message}. {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[type[UnknownName], tuple[object, ...]]:
        return type(self), (self.thing, self.value, self.allowed, self.hint, self.nearest)


class InvalidValue(UserError):
    """`value` can't be `thing`; `allowed` says in words what can ("an integer of at least 1")."""

    def __init__(self, thing: str, value: object, allowed: str, hint: str = "") -> None:
        self.thing = thing
        self.value = value
        self.allowed = allowed
        self.hint = hint
        message = f"{thing} is {value!r}: it must be {allowed}"
        super().__init__(f"{message}. {hint}" if hint else message)

    def __reduce__(self) -> tuple[type[InvalidValue], tuple[object, ...]]:
        return type(self), (self.thing, self.value, self.allowed, self.hint)


class ConfigError(UserError):
    """A model's configuration is malformed, truncated, or lacks a key that is needed."""


class IllegalRecipe(UserError):
    """A combination that the libraries refuse, or that vramplan can't model, with the reason."""


class ModelNotFound(UserError):
    """No such model: not bundled, not in a folder, not in the local cache, not on the Hub."""


class GatedModel(ModelNotFound):
    """The model is on the Hub, but its files need an accepted licence or a token."""


class Offline(ModelNotFound):
    """The Hub can't be reached, or was told not to be, and nothing local has the model."""


class TimedOut(ModelNotFound):
    """The Hub did not answer in time."""
