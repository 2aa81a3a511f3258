"""Which of the plans that fit is best, and which of them no other one beats in memory and cost.

Methods differ in what is learned, so cost never decides between them. They are taken in the order
of goal.METHODS: first the ones that have a plan that stays on the cards; then those that reach for
host memory. Within a method, too, nothing is offloaded where a plan stays on the cards; then cost
decides (or time, if the goal says so), then memory. Paged states that have no room on the card are
no offloading: what their paging takes is in the cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vramplan.planner.candidates import Candidate
from vramplan.planner.goal import METHODS, Goal

NEAR = 0.01
"""Costs, times and sizes that differ by less are equal: two runs of a recipe differ as much."""
ORDER_SAID = (
    "Quality comes first: full fine-tuning, LoRA, int8 LoRA, QLoRA, what stays on the GPU before "
    "what reaches for host memory. Within a method the cheapest is taken; of what costs the same "
    f"within {100 * NEAR:.0f} % the quickest, and then what needs least memory."
)


def objective(candidate: Candidate, goal: Goal) -> float:
    """What is to be least: seconds of a step, on all cards or on the clock."""
    assert candidate.seconds is not None, "only what fits is compared"
    return candidate.seconds * (1 if goal.objective == "time" else candidate.cards)


def key(candidate: Candidate, goal: Goal) -> tuple[float, float, int]:
    """Orders the plans of a method, the cheapest first."""
    return objective(candidate, goal), candidate.seconds or 0.0, candidate.footprint


def ranked(candidates: Iterable[Candidate], goal: Goal) -> list[Candidate]:
    """Those that fit, the cheapest first, whatever their method."""
    return sorted((c for c in candidates if c.fits), key=lambda c: key(c, goal))


def best_of(candidates: Iterable[Candidate], goal: Goal) -> Candidate | None:
    """The best plan of one method: the cheapest; of equal ones the quickest, and of these the one
    with least memory. Where one stays on the cards, none that offloads is."""
    fitting = ranked(candidates, goal)
    if not fitting:
        return None
    stay = [c for c in fitting if not c.offloads] if any(c.stays for c in fitting) else fitting
    cheap = _nearly_least(stay, [objective(c, goal) for c in stay])
    quick = _nearly_least(cheap, [c.seconds or 0.0 for c in cheap])
    small = _nearly_least(quick, [c.footprint for c in quick])
    return min(small, key=lambda c: key(c, goal))


def _nearly_least(candidates: list[Candidate], values: Sequence[float]) -> list[Candidate]:
    limit = min(values) * (1 + NEAR)
    return [c for c, value in zip(candidates, values, strict=True) if value <= limit]


def best_of_methods(candidates: Iterable[Candidate], goal: Goal) -> dict[str, Candidate]:
    """Of each method that has a plan: the best one, in the order of METHODS."""
    fitting = [c for c in candidates if c.fits]
    found = {m: best_of((c for c in fitting if c.method == m), goal) for m in METHODS}
    return {method: best for method, best in found.items() if best is not None}


def picked(candidates: Iterable[Candidate], goal: Goal) -> Candidate | None:
    """The plan to take; None where nothing fits."""
    fitting = [c for c in candidates if c.fits]
    staying = {c.method for c in fitting if c.stays}
    best = best_of_methods(fitting, goal)
    for method, candidate in best.items():
        if method in staying:
            return candidate
    return next(iter(best.values()), None)


def front(candidates: Iterable[Candidate], goal: Goal) -> list[Candidate]:
    """The plans that no other one beats in memory, cost, time and host memory, the cheapest
    first."""
    found: list[Candidate] = []
    for candidate in ranked(candidates, goal):  # none is beaten by a dearer one
        if dominator(candidate, found, goal) is None:
            found.append(candidate)
    return found


def dominator(candidate: Candidate, best: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """The plan among `best` that needs no more than `candidate` of the card and of its host, costs
    no more, and takes no longer."""
    mine = objective(candidate, goal)
    for other in best:
        if other is candidate:
            return None
        if (
            objective(other, goal) <= mine
            and (other.seconds or 0.0) <= (candidate.seconds or 0.0)
            and other.footprint <= candidate.footprint
            and other.reaches <= candidate.reaches
        ):
            return other
    return None
