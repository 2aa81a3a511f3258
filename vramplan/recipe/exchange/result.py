"""What reading another tool's file gives, and what writing one does."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from vramplan.errors import InvalidValue
from vramplan.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Of a run what costs no memory, where it is known."""

    data: str | None = None
    """A file, or the id of a dataset."""
    learning_rate: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    output: str | None = None
    """The folder that the run writes to."""
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "max_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise InvalidValue(name, value, "more than 0, and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A run as another tool's file describes it."""

    kind: str
    """axolotl, llama-factory, trl, training-arguments, deepspeed, recipe or plan."""
    model: str | None
    """What the file names as the model; None where it names none."""
    recipe: Recipe
    options: Options = field(default_factory=Options)
    warnings: tuple[str, ...] = ()
    """What the estimate does not honour, each with its key."""
    quiet: tuple[str, ...] = ()
    """Keys that were set, and cost no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A run as another tool's file."""

    text: str
    notes: tuple[str, ...] = ()
    """What the tool does otherwise than the run that is estimated."""
