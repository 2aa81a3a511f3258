"""cost(): hours, card-hours and dollars of training on so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from vramplan.errors import InvalidValue
from vramplan.hardware.gpu import Gpus
from vramplan.timing.step import StepTime

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a training run costs."""

    steps: int
    hours: float
    gpu_hours: float
    dollars: float | None = None
    """None where no price is known: card-hours are what there is."""
    price: float | None = None
    """Dollars a card and hour."""
    price_source: str | None = None


def cost(step: StepTime, tokens: int, gpus: Gpus, price: float | None = None) -> Cost:
    """Of `tokens` tokens at `step`'s pace on `gpus.count` cards.

    `price`: dollars a card and hour; None: the dated public list price of the card, if there is
    one. Raises InvalidValue for a price below zero or no tokens.
    """
    if price is not None and not price >= 0:
        raise InvalidValue("price", price, "dollars a card and hour, 0 or more")
    if type(tokens) is bool or not isinstance(tokens, int) or tokens < 1:
        raise InvalidValue("tokens", tokens, "an integer of at least 1")
    source = None if price is None else "given"
    if price is None:
        from vramplan.hardware.prices import list_price

        found = list_price(gpus.gpu.id)
        if found is not None:
            price, source = found.dollars, str(found)
    steps = ceil(tokens / step.tokens)
    hours = steps * step.seconds / HOUR
    gpu_hours = hours * gpus.count
    return Cost(
        steps=steps,
        hours=hours,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        price=price,
        price_source=source,
    )
