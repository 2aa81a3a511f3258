"""Which card to take: the job planned on every card of the catalogue, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from vramplan.errors import UserError
from vramplan.hardware.catalogue import all_gpus
from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.hardware.prices import list_price
from vramplan.memory.estimate import Model, resolve
from vramplan.models.architecture import Architecture
from vramplan.planner.candidates import Candidate
from vramplan.planner.cards import Cards, groups_of
from vramplan.planner.goal import METHODS, Goal
from vramplan.planner.plan import Plan, plan_on
from vramplan.planner.search import Memory
from vramplan.timing.cost import Cost

COUNTS = (1, 2, 4, 8)
"""Cards of one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A job on some cards."""

    gpus: Gpus
    pick: Candidate
    cost: Cost
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "gpu": self.gpus.gpu.id,
            "count": self.gpus.count,
            "memory": self.gpus.gpu.capacity,
            "method": self.pick.method,
            "recipe": self.pick.recipe.to_dict(),
            "required": self.pick.required,
            "seconds": self.pick.seconds,
            "cost": asdict(self.cost),
        }


def which_gpu(model: Model, goal: Goal = Goal(), cards: Cards = None) -> list[Offer]:  # noqa: B008
    """The job on each card of the catalogue of which a price is known (with `goal.price`: on each
    whose rates are known), or on `cards` alone, by as few of them as it takes.

    Offers of the best method come first, and of these the cheapest, or with the objective time the
    quickest. Without a price card-hours count. A card has no offer where nothing fits on 8 of it.
    Raises UserError as `fit` does.
    """
    name, arch, _ = resolve(model)
    named = cards is not None
    memory: Memory = {}
    kinds = [group.gpu for group in groups_of(cards)[0]] if named else _known(goal)
    found: list[Offer] = []
    errors: list[UserError] = []
    for gpu in kinds:
        card = Gpus(gpu=gpu, nominal=named and not gpu.arch)
        try:
            found += _offers(name, model, arch, card, goal, memory)
        except UserError as error:  # of this card: another may do
            errors.append(error)
    if errors and len(errors) == len(kinds):
        raise errors[0]
    return sorted(found, key=lambda offer: _order(offer, goal))


def _offers(
    name: str, model: Model, arch: Architecture, card: Gpus, goal: Goal, memory: Memory
) -> Iterator[Offer]:
    """Of one card: by each number of it, up to the first with which the best method stays on it."""
    pinned = goal.pins.get("world_size")
    for count in (pinned,) if pinned else COUNTS:
        if goal.effective_batch % count:
            continue
        wanted = replace(goal, pins={**goal.pins, "world_size": count})
        plan = plan_on(name, model, arch, replace(card, count=count), wanted, memory)
        if plan.pick is None:
            continue
        yield Offer(gpus=plan.gpus, pick=plan.pick, cost=plan.cost_of(plan.pick), plan=plan)
        if plan.pick.stays and plan.pick.method == goal.considered[0]:
            return


def _order(offer: Offer, goal: Goal) -> tuple[Any, ...]:
    """Quality, then what the goal asks for: cost, or time."""
    price = offer.cost.dollars
    cost = (price is None, price or offer.cost.gpu_hours)
    method = METHODS.index(offer.pick.method)
    asked = (offer.cost.hours,) if goal.objective == "time" else cost
    return (not offer.pick.stays, method, *asked)


def cheapest_by_method(offers: list[Offer]) -> dict[str, Offer]:
    """Of each method that some card has as its best: the cheapest offer."""
    best: dict[str, Offer] = {}
    for offer in offers:
        best.setdefault(offer.pick.method, offer)
    return best


def _known(goal: Goal) -> list[Gpu]:
    """NVIDIA's cards whose rates and price are known: what lies outside torch's counters was
    measured on these only."""
    cards = [g for g in all_gpus() if g.vendor == "nvidia" and g.fp16 and g.bandwidth]
    if goal.price is not None:
        return cards
    priced = [gpu for gpu in cards if list_price(gpu.id) is not None]
    return priced or cards
