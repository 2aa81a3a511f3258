"""Offers of cards for a job, the cheapest first: at most `width` columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vramplan.planner.goal import METHOD_NAMES, METHODS, Goal
from vramplan.planner.which import Offer, cheapest_by_method
from vramplan.reports.plan_words import count_said, dollars_said, title
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.candidates import Candidate

_ROWS = 12


def show(model: str, goal: Goal, offers: Sequence[Offer], look: Look = Look()) -> str:  # noqa: B008
    """The whole report."""
    parts = [_answer(model, goal, offers, look), _table(offers, look), _others(offers, look)]
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines)))


def _answer(model: str, goal: Goal, offers: Sequence[Offer], look: Look) -> Iterator[str]:
    if not offers:
        yield look.paint("No cards of the catalogue have room for this.", "bad")
    else:
        best = offers[0]
        method = METHOD_NAMES[best.pick.method]
        yield look.paint(f"Take {best.gpus} for {method}: {_price(best)}.", "good")
    yield from wrap(
        f"{model}: {goal.effective_batch} sequences of {goal.seq_len} tokens to a step, "
        f"{count_said(goal.tokens)} tokens in all.",
        look.width,
    )


def _table(offers: Sequence[Offer], look: Look) -> Iterator[str]:
    if not offers:
        return
    method = offers[0].pick.method
    mine = [offer for offer in offers if offer.pick.method == method]
    head = f"{'required':>11}{'tokens/s':>10}{'hours':>8}{'cost':>14}"
    yield look.paint(f"{title(method):<36}{head}", "heading")
    for offer in mine[:_ROWS]:
        yield _row(offer)
    if len(mine) > _ROWS:
        yield f"  ... and {len(mine) - _ROWS} more"
    source = next((o.cost.price_source for o in mine if o.cost.price_source), None)
    if source is None:
        yield "Without prices, card-hours are compared."
    elif source != "given":
        yield from wrap(
            "Prices are public list prices, dated, with their sources in --json; --price sets one "
            "for all.",
            look.width,
        )


def _row(offer: Offer) -> str:
    pick: Candidate = offer.pick
    name = str(offer.gpus)[:34]
    hours = f"{offer.cost.hours:>8.2f}"
    rate = f"{pick.tokens_per_second or 0:>10,.0f}"
    return f"  {name:<34}{format_bytes(pick.required or 0):>11}{rate}{hours}{_price(offer):>14}"


def _price(offer: Offer) -> str:
    if offer.cost.dollars is None:
        return f"{offer.cost.gpu_hours:.2f} card-h"
    return dollars_said(offer.cost.dollars)


def _others(offers: Sequence[Offer], look: Look) -> Iterator[str]:
    """The cheapest cards that only another method fits on."""
    best = cheapest_by_method(list(offers))
    rest = [best[m] for m in METHODS if m in best and best[m] is not offers[0]]
    if rest:
        yield look.paint("Where only another method fits, the cheapest", "heading")
    for offer in rest:
        host = ", with host memory" if not offer.pick.stays else ""
        yield f"  {METHOD_NAMES[offer.pick.method]}{host}: {offer.gpus}, {_price(offer)}"
