"""A Plan without a pick: what came nearest of each method, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vramplan.memory.advice import combine, recipe_flags
from vramplan.planner.candidates import HOST
from vramplan.planner.explain import larger_card, more_cards, smallest_card, zero_said
from vramplan.planner.goal import METHOD_NAMES
from vramplan.reports.plan import step_said
from vramplan.reports.plan_words import considered_said, host_said, notes_of
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.candidates import Candidate
    from vramplan.planner.plan import Plan


def show(plan: Plan, *, look: Look = Look()) -> str:  # noqa: B008
    """The whole report."""
    parts = [
        _answer(plan, look),
        _misses(plan, look),
        _remedies(plan, look),
        iter(wrap(considered_said(plan), look.width)),
        _notes(plan, look),
    ]
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines)))


def _answer(plan: Plan, look: Look) -> Iterator[str]:
    goal = plan.goal
    yield look.paint(f"Nothing fits on {plan.gpus}.", "bad")
    yield from wrap(
        f"{plan.id}: {goal.effective_batch} sequences of {goal.seq_len} tokens to a step, by "
        f"{', '.join(METHOD_NAMES[m] for m in goal.considered)}.",
        look.width,
    )


def _misses(plan: Plan, look: Look) -> Iterator[str]:
    head = f"{'required':>11}{'available':>12}{'too much':>12}"
    yield look.paint(f"{'The nearest of each method':<27}{head}", "heading")
    for method, miss in plan.misses.items():
        yield (
            f"  {METHOD_NAMES[method]:<25}{format_bytes(miss.required or 0):>11}"
            f"{format_bytes(miss.available or 0):>12}{_excess(plan, miss):>12}"
        )
        for line in wrap(settings_said(miss), look.width - 4):
            yield f"    {line}"
    if any(not miss.too_much for miss in plan.misses.values()):
        yield from wrap(f"  * of host memory. {host_said(plan)}", look.width)


def _excess(plan: Plan, miss: Candidate) -> str:
    if miss.too_much:
        return format_bytes(miss.too_much)
    return f"{format_bytes(miss.host - (plan.host_memory or 0))} *"


def settings_said(candidate: Candidate) -> str:
    """How a candidate would run."""
    recipe = candidate.recipe
    said = [f"micro-batch {recipe.batch_size}", recipe.optimizer]
    said.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.deepspeed is not None or recipe.world_size > 1:
        said.append(zero_said(recipe))
    if not candidate.stays and candidate.host:
        said.append(f"{format_bytes(candidate.host)} of host memory")
    return ", ".join(said)


def _remedies(plan: Plan, look: Look) -> Iterator[str]:
    said = list(remedies(plan))
    if said:
        yield look.paint("What would make it fit", "heading")
    for sentence in said:
        first, *more = wrap(sentence, look.width - 4)
        yield f"  - {first}"
        yield from (f"    {line}" for line in more)


def remedies(plan: Plan) -> Iterator[str]:
    """Changes to the job or the card, each of which suffices."""
    found = smallest_card(plan)
    if found is not None:
        gpu, miss = found
        yield (
            f"The smallest card that would do: {gpu.name} ({format_bytes(gpu.capacity)}), for "
            f"{METHOD_NAMES[miss.method]}."
        )
    for step in (larger_card(plan), more_cards(plan)):
        if step is not None and step.plan.pick is not None:
            yield step_said(step)
    hosted = [c for c in plan.candidates if c.verdict == HOST]
    if hosted:
        least = min(hosted, key=lambda c: c.host)
        yield (
            f"{format_bytes(least.host)} of host memory (--host-memory): "
            f"{METHOD_NAMES[least.method]}, {zero_said(least.recipe)}."
        )
    yield from _changed_job(plan)


def _changed_job(plan: Plan) -> Iterator[str]:
    """What `vramplan estimate` advises for the nearest miss: it may alter what is learned."""
    misses = [c for c in plan.misses.values() if c.too_much]
    if not misses:
        return
    nearest = min(misses, key=lambda c: c.too_much)
    if nearest.recipe.world_size > 1:
        return
    change = combine(plan.estimate_of(nearest))
    if change is not None:
        flags = " ".join(recipe_flags(change.recipe, nearest.recipe))
        learned = "; it changes what is learned" if change.alters_training else ""
        yield (
            f"Another job: {change.name} ({flags}), with {format_bytes(change.required)} "
            f"required{learned}."
        )


def _notes(plan: Plan, look: Look) -> Iterator[str]:
    for note in notes_of(replace(plan, pick=None)):
        yield from wrap(f"{note[:1].upper()}{note[1:]}", look.width)
