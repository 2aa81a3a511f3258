"""A recipe with its verdict: what it needs, takes, and why it is or is not in question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vramplan.planner.space import LOWER, MISSING, NO_BETTER
from vramplan.recipe.recipe import Recipe

FITS = "fits"
TOO_LARGE = "too large"
HOST = "too much host memory"
VERDICTS = (FITS, TOO_LARGE, HOST, NO_BETTER, LOWER, MISSING)


def offloads(recipe: Recipe) -> bool:
    """Whether DeepSpeed keeps states or weights of it in host memory."""
    zero = recipe.deepspeed
    return zero is not None and bool(zero.offload_optimizer or zero.offload_param)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One recipe of the space. Sizes are bytes on each card, but `host`."""

    method: str
    recipe: Recipe
    verdict: str
    """One of VERDICTS."""
    why: str = ""
    """Of what was not evaluated: what speaks against it."""
    required: int | None = None
    """None: not evaluated."""
    at_least: bool = False
    """`required` is a bound: weights, states and gradients alone are too much."""
    available: int | None = None
    host: int = 0
    """Host memory of all ranks together: what is offloaded, and what is paged out."""
    managed: int = 0
    """Optimizer states in CUDA managed memory, on the card while there is room."""
    paged_out: int = 0
    """Those of them that the card has no room for."""
    seconds: float | None = None
    """Of an optimizer step; None where it does not fit, or no rate is known."""
    tokens: int = 0
    """Of an optimizer step, all ranks."""

    @property
    def fits(self) -> bool:
        """Whether it is in question."""
        return self.verdict == FITS

    @property
    def footprint(self) -> int:
        """Bytes of a card that it occupies: `required`, and the managed states that have room."""
        return (self.required or 0) + self.managed - self.paged_out

    @property
    def too_much(self) -> int:
        """Bytes that it needs beyond what a card has; 0 where it fits."""
        if self.required is None or self.available is None:
            return 0
        return max(0, self.required - self.available)

    @property
    def cards(self) -> int:
        """How many it uses."""
        return self.recipe.world_size

    @property
    def offloads(self) -> bool:
        """Whether it keeps states or weights in host memory by DeepSpeed."""
        return offloads(self.recipe)

    @property
    def stays(self) -> bool:
        """Whether all that it trains with is on the cards."""
        return not self.offloads and not self.paged_out

    @property
    def reaches(self) -> int:
        """Bytes of host memory that it trains with; 0 where all stays on the cards."""
        return 0 if self.stays else self.host

    @property
    def card_seconds(self) -> float | None:
        """Of an optimizer step: its time on all of its cards. Cost is proportional to it."""
        return None if self.seconds is None else self.seconds * self.cards

    @property
    def tokens_per_second(self) -> float | None:
        """Of all cards together."""
        return None if not self.seconds else self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidate:
        """The reverse of `to_dict`."""
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        return cls(**{**given, "recipe": Recipe.from_dict(given["recipe"])})
