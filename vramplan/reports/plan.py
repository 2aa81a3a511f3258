"""A Plan as text for a terminal: the pick, why, what else there is, at most `width` columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vramplan.planner.explain import Step, differences, zero_said
from vramplan.planner.goal import METHOD_NAMES, METHODS
from vramplan.planner.rank import NEAR, ORDER_SAID
from vramplan.reports.plan_words import (
    batch_said,
    cards_said,
    considered_said,
    count_said,
    dollars_said,
    host_said,
    hours_said,
    needs_said,
    notes_of,
    pace_said,
    relative_cost,
    title,
)
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.candidates import Candidate
    from vramplan.planner.plan import Plan
    from vramplan.recipe.recipe import Recipe

_FRONT = 6
"""Rows of the front that are shown."""


def show(
    plan: Plan,
    *,
    steps: Sequence[Step] = (),
    command: str = "",
    look: Look = Look(),  # noqa: B008
) -> str:
    """The whole report of a plan that has a pick. `steps`: the same job on other cards; `command`:
    what runs it."""
    assert plan.pick is not None
    parts = [
        _answer(plan, look),
        _recipe(plan, look),
        _figures(plan, look),
        _why(plan, look),
        _methods(plan, look),
        _front(plan, look),
        _steps(plan, steps, look),
        _considered(plan, look),
        _items("Notes", notes_of(plan), look),
        _command(command, look),
    ]
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines)))


# --- the pick -------------------------------------------------------------------------------


def _answer(plan: Plan, look: Look) -> Iterator[str]:
    pick = plan.pick
    assert pick is not None
    where = cards_said(plan, pick)
    yield look.paint(f"Take {METHOD_NAMES[pick.method]} on {where}.", "good")
    goal = plan.goal
    yield from wrap(
        f"{plan.id}: {goal.effective_batch} sequences of {goal.seq_len} tokens to a step, "
        f"{count_said(goal.tokens)} tokens in all.",
        look.width,
    )


def _recipe(plan: Plan, look: Look) -> Iterator[str]:
    recipe = plan.recipe
    assert recipe is not None
    rows = [("weights", _weights(recipe))]
    if recipe.lora is not None:
        targets = recipe.lora.target_modules
        named = targets if isinstance(targets, str) else ", ".join(targets)
        dropout = f"dropout {recipe.lora.dropout:g}"
        rows.append(("adapters", f"rank {recipe.lora.rank}, {named}, {dropout}"))
    rows.append(("batch", batch_said(recipe)))
    checkpointing = "on" if recipe.gradient_checkpointing else "off"
    rows.append(("checkpointing", checkpointing))
    rows.append(("attention", recipe.attention))
    rows.append(("optimizer", recipe.optimizer))
    if recipe.deepspeed is not None or recipe.world_size > 1:
        rows.append(("cards share by" if recipe.world_size > 1 else "ZeRO", zero_said(recipe)))
    for name, what in rows:
        yield from _row(name, what, look)


def _weights(recipe: Recipe) -> str:
    mixed = recipe.mixed_precision
    autocast = "no mixed precision" if mixed == "no" else f"{mixed} mixed precision"
    if recipe.quantization is None:
        return f"{recipe.dtype}, {autocast}"
    twice = ", double quant" if recipe.double_quant and recipe.quantization != "int8" else ""
    return f"{recipe.quantization}{twice}, {autocast}"


def _figures(plan: Plan, look: Look) -> Iterator[str]:
    pick = plan.pick
    assert pick is not None
    assert pick.required is not None
    assert pick.available is not None
    spare = format_bytes(pick.available - pick.required)
    now = "free now" if plan.gpus.free is not None else "available"
    each = " on each card" if pick.cards > 1 else ""
    memory = f"{format_bytes(pick.required)} required{each}, "
    memory += f"{format_bytes(pick.available)} {now}: {spare} to spare"
    step, cost = plan.step_of(pick), plan.cost_of(pick)
    yield from _row("memory", memory, look)
    if not pick.stays:
        where = "of host memory, all ranks together"
        yield from _row("host", f"{format_bytes(pick.host)} {where}", look)
    yield from _row(
        "speed", f"{step.tokens_per_second:,.0f} tokens/s, {step.seconds:.3g} s a step", look
    )
    hours = f"{hours_said(cost.hours)}"
    if pick.cards > 1:
        hours += f", {cost.gpu_hours:.2f} card-hours,"
    yield from _row("time", f"{hours} for {count_said(plan.goal.tokens)} tokens", look)
    if cost.dollars is None:
        said = f"{cost.gpu_hours:.2f} card-hours; no price is known (--price)"
    else:
        said = f"{dollars_said(cost.dollars)} at ${cost.price:g} a card and hour"
        said += f" ({cost.price_source})"
    yield from _row("cost", said, look)


def _row(name: str, what: str, look: Look) -> Iterator[str]:
    first, *more = wrap(what, look.width - 18) or [""]
    yield f"  {name:<15} {first}".rstrip()
    yield from (" " * 18 + line for line in more)


# --- why ------------------------------------------------------------------------------------


def _why(plan: Plan, look: Look) -> Iterator[str]:
    yield look.paint("Why", "heading")
    for sentence in reasons(plan):
        first, *more = wrap(sentence, look.width - 4)
        yield f"  - {first}"
        yield from (f"    {line}" for line in more)


def reasons(plan: Plan) -> Iterator[str]:
    """What speaks for the pick, in sentences."""
    pick = plan.pick
    assert pick is not None
    for method in METHODS[: METHODS.index(pick.method)]:
        if method in plan.best:
            best = plan.best[method]
            yield (
                f"{title(method)} fits only by reaching for host memory "
                f"({format_bytes(best.host)} of it), and {pace_said(plan, best)}."
            )
        elif method in plan.misses and not plan.misses[method].too_much:
            miss = plan.misses[method]
            yield (
                f"{title(method)} does not fit: it would take "
                f"{format_bytes(miss.host)} of host memory. {host_said(plan)}"
            )
        elif method in plan.misses:
            miss = plan.misses[method]
            yield (
                f"{title(method)} does not fit: at its least it needs "
                f"{format_bytes(miss.required or 0)}, {format_bytes(miss.too_much)} too much."
            )
    if len(plan.goal.considered) > 1:
        yield ORDER_SAID
    runner = plan.runner_up
    if runner is not None:
        change = ", ".join(differences(runner.recipe, pick.recipe)) or "the same settings"
        yield f"Runner-up: {change}. It {needs_said(runner, pick)} and {pace_said(plan, runner)}."
    quickest = plan.quickest
    if quickest is not None and (quickest.seconds or 0) * 1.02 < (pick.seconds or 0):
        change = ", ".join(differences(quickest.recipe, pick.recipe))
        quicker = (pick.seconds or 0) / (quickest.seconds or 1)
        yield (
            f"Quickest (--objective time): {change}. It is {quicker:.2f} times as quick and "
            f"{pace_said(plan, quickest)}."
        )
    yield from _larger_batch(plan)


def _larger_batch(plan: Plan) -> Iterator[str]:
    """What keeps the micro-batch from growing."""
    pick = plan.pick
    assert pick is not None
    mine = pick.recipe
    for c in plan.candidates:
        r = c.recipe
        if (
            c.verdict == "too large"
            and not c.at_least
            and r.batch_size > mine.batch_size
            and not [d for d in differences(r, mine) if not d.startswith("micro-batch")]
        ):
            yield f"Micro-batch {r.batch_size} would need {format_bytes(c.too_much)} too much."
            return


# --- what else there is ---------------------------------------------------------------------


def _methods(plan: Plan, look: Look) -> Iterator[str]:
    if len(plan.best) + len(plan.misses) < 2:
        return
    head = f"{'required':>11}{'tokens/s':>10}{'hours':>8}{'cost':>9}"
    yield look.paint(f"{'The best of each method':<24}{head}", "heading")
    for method in METHODS:
        name = METHOD_NAMES[method]
        if method in plan.best:
            mark = ">" if plan.best[method] is plan.pick else " "
            yield _best_row(plan, plan.best[method], f"{mark} {name}")
        elif method in plan.misses:
            miss = plan.misses[method]
            short = f"{format_bytes(miss.too_much)} too much"
            if not miss.too_much:
                short = f"and {format_bytes(miss.host)} of host memory: too much"
            yield f"  {name:<22}{format_bytes(miss.required or 0):>11}   {short}"
    yield from _indented(ways(plan), look)


def ways(plan: Plan) -> str:
    """How the methods' best plans differ from the pick, where the name does not say it."""
    assert plan.pick is not None
    said = []
    for method, best in plan.best.items():
        if best is plan.pick:
            continue
        zero = best.recipe.deepspeed
        host = f", {format_bytes(best.host)} of host memory" if not best.stays else ""
        way = f"micro-batch {best.recipe.batch_size}"
        way += ", checkpointing" if best.recipe.gradient_checkpointing else ", no checkpointing"
        way += f", {zero_said(best.recipe)}" if zero or best.cards > 1 else ""
        said.append(f"{METHOD_NAMES[method]}: {way}{host}.")
    return " ".join(said)


def _best_row(plan: Plan, best: Candidate, name: str) -> str:
    cost = plan.cost_of(best)
    price = f"{relative_cost(best, plan.pick or best):.2f} x"
    if cost.dollars is not None:
        price = dollars_said(cost.dollars)
    return (
        f"{name:<24}{format_bytes(best.required or 0):>11}{best.tokens_per_second or 0:>10,.0f}"
        f"{cost.hours:>8.2f}{price:>9}"
    )


def _front(plan: Plan, look: Look) -> Iterator[str]:
    pick, found = plan.pick, plan.front
    if pick is None or len(found) < 2:
        return
    yield look.paint(f"{'Memory against cost':<24}{'required':>11}{'cost':>8}", "heading")
    for candidate in _distinct(found, pick)[:_FRONT]:
        change = ", ".join(differences(candidate.recipe, pick.recipe)) or "the pick"
        share = relative_cost(candidate, pick)
        row = f"{'':24}{format_bytes(candidate.footprint):>11}{share:>6.2f} x  "
        first, *more = wrap(change, look.width - len(row))
        yield row + first
        yield from (" " * len(row) + line for line in more)


def _distinct(found: Sequence[Candidate], pick: Candidate) -> list[Candidate]:
    """Without those that only just differ from the one before, or from the pick."""
    shown: list[Candidate] = []
    for c in found:
        near = [
            o for o in (*shown[-1:], pick) if abs(c.footprint - o.footprint) < c.footprint / 100
        ]
        alike = any(abs(relative_cost(c, o) - 1) < NEAR for o in near)
        if c == pick or not alike:
            shown.append(c)
    return shown


def _steps(plan: Plan, steps: Sequence[Step], look: Look) -> Iterator[str]:
    if steps:
        yield look.paint("With more", "heading")
    for step in steps:
        yield from _indented(step_said(step), look, mark="- ")


def step_said(step: Step) -> str:
    """What other cards would make of the job."""
    pick = step.plan.pick
    if pick is None:
        return f"{step.gpus}: still nothing fits."
    method = METHOD_NAMES[pick.method]
    said = f"{step.gpus}: "
    if step.quicker is None or step.cost is None:
        return f"{said}{method} fits, with {format_bytes(pick.required or 0)} required."
    if step.method:
        said += f"{method} becomes possible; "
    elif pick.cards < step.gpus.count:
        return f"{said}the best plan would use {pick.cards} of them."
    else:
        said += f"{method}; "
    if not step.method and abs(step.quicker - 1) < NEAR and abs(step.cost - 1) < NEAR:
        return f"{step.gpus}: {method}, no quicker and no cheaper."
    how = f"micro-batch {pick.recipe.batch_size}"
    how += ", checkpointing" if pick.recipe.gradient_checkpointing else ", no checkpointing"
    how += f", {zero_said(pick.recipe)}" if pick.cards > 1 else ""
    return f"{said}{how}. {step.quicker:.2f} x the tokens/s for {step.cost:.2f} x the card-hours."


def _command(command: str, look: Look) -> Iterator[str]:
    if command:
        yield look.paint("To run it", "heading")
    yield from (f"  {line}" for line in command.splitlines())


def _considered(plan: Plan, look: Look) -> Iterator[str]:
    yield from wrap(considered_said(plan), look.width)


def _items(title: str, sentences: Sequence[str], look: Look) -> Iterator[str]:
    if sentences:
        yield look.paint(title, "heading")
    for sentence in sentences:
        yield from _indented(sentence[:1].upper() + sentence[1:], look, mark="- ")


def _indented(text: str, look: Look, mark: str = "") -> Iterator[str]:
    for k, line in enumerate(wrap(text, look.width - 2 - len(mark))):
        yield f"  {mark if k == 0 else ' ' * len(mark)}{line}"
