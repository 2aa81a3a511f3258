"""How far a recipe goes on a card: the longest sequence, the largest batch.

What a run needs is a maximum of polynomials in batch and sequence without negative terms, so it
never falls as either grows: halving an interval over the closed form finds the very last value
that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vramplan.errors import UserError
from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.memory.estimate import Estimate, Model, cards, estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.recipe.recipe import Recipe

FURTHEST = {"seq_len": 2**27, "batch_size": 2**20}
"""Nobody asks for more: 134 million tokens a sequence, a million sequences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The last value of one field of a recipe that fits. Sizes are bytes."""

    field: str
    """seq_len or batch_size."""
    largest: int
    """0: not even 1 fits."""
    required: int | None
    """At `largest`; None where that is 0."""
    beyond: int | None
    """What the next value would need; None where it is not memory that ends it."""
    why: str = ""
    """What ends it, where memory does not."""
    available: int
    recipe: Recipe
    """With `largest` in it; of 0: with 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("field", "largest", "required", "beyond", "why", "available")
        return {n: getattr(self, n) for n in names} | {"recipe": self.recipe.to_dict()}


def longest_sequence(model: Model, recipe: Recipe, gpu: str | Gpu | Gpus) -> Limit:
    """The longest sequence with which `recipe` fits. Raises UserError as `estimate` does."""
    return _limit(model, recipe, gpu, "seq_len")


def largest_batch(model: Model, recipe: Recipe, gpu: str | Gpu | Gpus) -> Limit:
    """The largest micro-batch with which `recipe` fits. Raises UserError as `estimate` does."""
    return _limit(model, recipe, gpu, "batch_size")


def within_positions(model: Model, recipe: Recipe) -> Recipe:
    """`recipe` with no longer a sequence than the model's learned positions, for where its length
    was not chosen."""
    end, _ = _end(resolve(model)[1], "seq_len")
    return recipe if recipe.seq_len <= end else replace(recipe, seq_len=end)


def _limit(model: Model, recipe: Recipe, gpu: str | Gpu | Gpus, field: str) -> Limit:
    _, arch, _ = resolve(model)
    gpus = cards(gpu)
    assert gpus is not None, "a limit is a card's"

    def at(value: int) -> Estimate:
        changed = (
            replace(recipe, seq_len=value)
            if field == "seq_len"
            else replace(recipe, batch_size=value)
        )
        return estimate(arch, changed, gpus)

    end, why = _end(arch, field)
    first = at(1)
    available = first.available
    assert available is not None
    if not first.fits:
        return Limit(
            field=field,
            largest=0,
            required=None,
            beyond=first.required,
            available=available,
            recipe=first.recipe,
        )
    found = last(lambda value: at(value).fits is True, end)
    needed = at(found)
    if found == end:
        return Limit(
            field=field,
            largest=found,
            required=needed.required,
            beyond=None,
            why=why,
            available=available,
            recipe=needed.recipe,
        )
    beyond = at(found + 1)
    if beyond.fits:  # pragma: no cover  # halving ends between one that fits and one that doesn't
        raise AssertionError(f"{field} {found} is not the last one that fits")
    return Limit(
        field=field,
        largest=found,
        required=needed.required,
        beyond=beyond.required,
        available=available,
        recipe=needed.recipe,
    )


def last(fits: Callable[[int], bool], end: int) -> int:
    """The last of 1 to `end` for which `fits`, which holds for 1 and never again once it fails."""
    low, high = 1, 2
    while high <= end and fits(high):
        low, high = high, 2 * high
    if high > end:
        if fits(end):
            return end
        high = end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _end(arch: Architecture, field: str) -> tuple[int, str]:
    """The last value that there is, and why."""
    if field == "seq_len" and arch.learned_positions and arch.max_positions:
        return (
            arch.max_positions,
            f"the model has only {arch.max_positions} learned positions",
        )
    return FURTHEST[field], "no one asks for more"


def limits(
    model: Model, recipe: Recipe, gpu: str | Gpu | Gpus, fields: tuple[str, ...]
) -> list[Limit]:
    """A limit for each of `fields`. Raises UserError for another name than those of FURTHEST."""
    for field in fields:
        if field not in FURTHEST:
            raise UserError(f"no limit of {field}: there are those of {' and '.join(FURTHEST)}")
    return [_limit(model, recipe, gpu, field) for field in fields]
