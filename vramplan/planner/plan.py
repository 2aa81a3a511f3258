"""fit(): every recipe for a goal, judged on the cards at hand, and the one to take."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from vramplan.errors import IllegalRecipe, UserError
from vramplan.hardware.gpu import Gpus
from vramplan.memory.estimate import Estimate, Model, estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.planner.candidates import Candidate
from vramplan.planner.cards import Cards, groups_of
from vramplan.planner.clock import cost_of, paged, seconds_of
from vramplan.planner.contradictions import explain_emptiness
from vramplan.planner.goal import HOST_A_CARD, METHODS, Goal
from vramplan.planner.rank import (
    best_of,
    best_of_methods,
    dominator,
    front,
    key,
    picked,
    ranked,
)
from vramplan.planner.search import Evaluator, Memory, nearest_misses, search
from vramplan.planner.space import Space
from vramplan.recipe.recipe import Recipe
from vramplan.timing.cost import Cost
from vramplan.timing.step import StepTime, step_time

FALLBACKS = 4
"""Smaller plans that a launcher gets, should the card turn out to have less."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found for a model, its cards and a goal. Sizes are bytes."""

    id: str
    source: Any
    """The model as it was asked for: what `estimate` takes again."""
    architecture: Architecture
    gpus: Gpus
    goal: Goal
    candidates: Sequence[Candidate]
    """Every legal recipe, with its verdict."""
    pick: Candidate | None
    """The one to take; None: nothing fits."""
    evaluated: int = 0
    """Candidates whose memory was reckoned in full."""
    notes: tuple[str, ...] = ()
    host_memory: int | None = None
    """Bytes that offloading was allowed."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many candidates have each verdict."""
    _misses: tuple[Candidate, ...] | None = field(default=None, repr=False)

    @property
    def recipe(self) -> Recipe | None:
        """The picked recipe."""
        return None if self.pick is None else self.pick.recipe

    @cached_property
    def best(self) -> dict[str, Candidate]:
        """The best plan of each method that has one, the method of best quality first."""
        return best_of_methods(self.candidates, self.goal)

    @cached_property
    def of_the_method(self) -> list[Candidate]:
        """The plans of the pick's method, the best first."""
        if self.pick is None:
            return []
        mine = (c for c in self.candidates if c.method == self.pick.method)
        return ranked(mine, self.goal)

    @cached_property
    def front(self) -> list[Candidate]:
        """Plans of the pick's method that no other one beats in memory and cost."""
        return front(self.of_the_method, self.goal)

    @property
    def runner_up(self) -> Candidate | None:
        """What would be taken of the pick's method if the pick were not there."""
        return best_of((c for c in self.of_the_method if c is not self.pick), self.goal)

    @property
    def fallbacks(self) -> list[Candidate]:
        """Smaller plans of the same method on as many cards, should the pick not fit after all:
        each needs less than the one before, at the least further cost."""
        pick = self.pick
        if pick is None:
            return []
        found, least = [], pick.required or 0
        for candidate in self.of_the_method:
            if candidate.cards == pick.cards and (candidate.required or 0) < least:
                found.append(candidate)
                least = candidate.required or 0
        return found[:FALLBACKS]

    @property
    def quickest(self) -> Candidate | None:
        """The plan of the pick's method that takes least time, if that is not the pick."""
        if self.pick is None:
            return None
        found = best_of(self.of_the_method, replace(self.goal, objective="time"))
        return None if found is self.pick else found

    @cached_property
    def misses(self) -> dict[str, Candidate]:
        """Of each method of which nothing fits: the candidate that needs least."""
        if self._misses is not None:
            return {c.method: c for c in self._misses}
        evaluator = Evaluator(self.architecture, self.gpus, self.host_memory)
        found = nearest_misses(self.candidates, evaluator)
        by_method = {c.method: c for c in found}
        return {m: by_method[m] for m in METHODS if m in by_method}

    @cached_property
    def estimate(self) -> Estimate | None:
        """What the pick needs, in full."""
        return None if self.pick is None else self.estimate_of(self.pick)

    def estimate_of(self, candidate: Candidate) -> Estimate:
        """What a candidate needs, in full."""
        needed = estimate(self.architecture, candidate.recipe, self.gpus)
        return replace(needed, id=self.id)

    def step_of(self, candidate: Candidate) -> StepTime:
        """The time of a candidate's step, by cause."""
        step = step_time(self.architecture, candidate.recipe, self.gpus)
        return paged(step, candidate.paged_out, self.gpus.gpu)

    def cost_of(self, candidate: Candidate) -> Cost:
        """Hours and cost of the goal's tokens by a candidate."""
        goal = self.goal
        step = self.step_of(candidate)
        return cost_of(step, goal.tokens, self.gpus, candidate.cards, goal.price)

    def dominator(self, candidate: Candidate) -> Candidate | None:
        """The plan of its method that needs no more memory, costs no more and takes no longer."""
        mine = (c for c in self.candidates if c.method == candidate.method)
        return dominator(candidate, front(mine, self.goal), self.goal)

    def table(self) -> list[dict[str, Any]]:
        """Every candidate with its verdict: too much by how many bytes, beaten by whom."""
        from vramplan.planner.files import table_of

        return table_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as plan.json holds it; `candidates` by their number only."""
        from vramplan.planner.files import document_of

        return document_of(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Plan:
        """The plan in such a document: the pick, and the candidates that it holds."""
        from vramplan.planner.files import plan_of

        return plan_of(document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes plan.json. Raises UserError if there is such a file already."""
        from vramplan.planner.files import write_plan

        write_plan(self, path)


def fit(model: Model, gpus: Cards = None, goal: Goal = Goal()) -> Plan:  # noqa: B008
    """The cheapest recipe for `goal` that fits, and all the others with their verdicts.

    `model`: as `estimate` takes it. `gpus`: a name or size ("24GB", "4xA100-80GB"), cards, or
    several of these; None: the cards in this machine, of which what is free counts.

    Raises UserError for what is wrong with the input: an unknown name, no card, decisions that
    contradict each other. That nothing fits is no error: `Plan.pick` is then None.
    """
    name, arch, notes = resolve(model)
    groups, said = groups_of(gpus)
    plans, errors = [], []
    for group in groups:
        try:
            plans.append(_planned(name, model, arch, group, goal))
        except UserError as error:  # of this kind of card: another may do
            errors.append(error)
    if not plans:
        raise errors[0]
    best = min(plans, key=lambda plan: _order(plan, goal))
    return replace(best, notes=(*notes, *said))


def plan_for(plan: Plan, gpus: Gpus) -> Plan:
    """The same job on other cards. Only what can be picked is looked at."""
    return _planned(plan.id, plan.source, plan.architecture, gpus, plan.goal, whole=False)


def plan_on(
    name: str, model: Model, arch: Architecture, gpus: Gpus, goal: Goal, memory: Memory
) -> Plan:
    """As `fit`, of a model that is at hand. Only what can be picked is looked at; `memory` keeps
    from one kind of card to the next what does not depend on it."""
    return _planned(name, model, arch, gpus, goal, whole=False, memory=memory)


def _planned(
    name: str,
    model: Model,
    arch: Architecture,
    gpus: Gpus,
    goal: Goal,
    *,
    whole: bool = True,
    memory: Memory | None = None,
) -> Plan:
    _check_world(goal, gpus)
    host_memory = _host_memory(goal, gpus)
    space = Space(arch, gpus.gpu, gpus.count, goal, whole=whole)
    found = search(space, Evaluator(arch, gpus, host_memory, memory), seconds_of)
    if all(c.required is None for c in found.candidates):
        raise explain_emptiness(space, found.refused)
    return Plan(
        id=name,
        source=model,
        architecture=arch,
        gpus=gpus,
        goal=goal,
        candidates=found.candidates,
        pick=picked(found.candidates, goal),
        evaluated=found.evaluated,
        host_memory=host_memory,
        counts=Counter(c.verdict for c in found.candidates),
    )


def _check_world(goal: Goal, gpus: Gpus) -> None:
    wanted = goal.pins.get("world_size", 1)
    if wanted > gpus.count:
        raise IllegalRecipe(
            f"world_size {wanted} and {gpus} contradict each other: there are not so many cards. "
            "Leave one of them out"
        )


def _order(plan: Plan, goal: Goal) -> tuple[Any, ...]:
    """Plans for unlike cards: the method first, then what the goal asks for."""
    if plan.pick is None:
        return (len(METHODS) * 2,)
    staying = any(c.stays for c in plan.of_the_method)
    behind = 0 if staying else len(METHODS)
    return (METHODS.index(plan.pick.method) + behind, *key(plan.pick, goal))


def _host_memory(goal: Goal, gpus: Gpus) -> int:
    """Bytes that offloading may take."""
    if goal.host_memory is not None:
        return goal.host_memory
    here = _physical_memory() if gpus.indices else None
    return HOST_A_CARD * gpus.count if here is None else here


def _physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
