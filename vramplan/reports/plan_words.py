"""A Plan in words: sentences and figures that its reports share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vramplan.planner.candidates import FITS, HOST, TOO_LARGE
from vramplan.planner.goal import METHOD_NAMES
from vramplan.planner.space import LOWER, MISSING, NO_BETTER
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import LoRA
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.candidates import Candidate
    from vramplan.planner.plan import Plan
    from vramplan.recipe.recipe import Recipe


def cards_said(plan: Plan, candidate: Candidate) -> str:
    """The cards that a candidate uses."""
    name, used = plan.gpus.gpu.name, candidate.cards
    if plan.gpus.count == 1:
        return name
    return f"{used} of {plan.gpus.count} x {name}" if used < plan.gpus.count else f"{used} x {name}"


def batch_said(recipe: Recipe) -> str:
    """Micro-batch, accumulation and ranks."""
    said = f"{recipe.batch_size} x {recipe.seq_len} tokens"
    if recipe.world_size > 1:
        said += f" on each of {recipe.world_size} cards"
    steps = recipe.gradient_accumulation_steps
    return f"{said}, accumulated {steps} times" if steps > 1 else said


def title(method: str) -> str:
    """A method at a sentence's beginning."""
    name = METHOD_NAMES[method]
    return name[:1].upper() + name[1:]


def needs_said(candidate: Candidate, base: Candidate) -> str:
    """How its memory compares."""
    less = base.footprint - candidate.footprint
    if less == 0:
        return "needs as much memory"
    return f"needs {format_bytes(abs(less))} {'less' if less > 0 else 'more'}"


def pace_said(plan: Plan, candidate: Candidate) -> str:
    """How its cost compares with the pick's."""
    assert plan.pick is not None
    share = relative_cost(candidate, plan.pick)
    if share >= 2:
        return f"costs {share:.1f} times as much"
    if abs(share - 1) < 0.0005:
        return "costs the same"
    return f"costs {abs(share - 1):.1%} {'more' if share > 1 else 'less'}"


def relative_cost(candidate: Candidate, base: Candidate) -> float:
    """Card-hours as a share of the other's."""
    return (candidate.card_seconds or 0.0) / (base.card_seconds or 1.0)


_VERDICTS = {
    FITS: "fit",
    TOO_LARGE: "are too large",
    HOST: "need too much host memory",
    NO_BETTER: "are no better than one of these",
    LOWER: "round more than they have to",
    MISSING: "need flash-attn, which is not installed",
}


def considered_said(plan: Plan) -> str:
    """How many recipes were looked at, and what became of them."""
    total = sum(plan.counts.values())
    said = [f"{plan.counts[v]:,} {word}" for v, word in _VERDICTS.items() if plan.counts.get(v)]
    return f"Of {total:,} legal recipes {', '.join(said)}. --json --all lists them."


def notes_of(plan: Plan) -> list[str]:
    """What was assumed, or should be known."""
    return [f"{note.rstrip('.')}." for note in (*plan.notes, *_notes_of_the_pick(plan))]


def _notes_of_the_pick(plan: Plan) -> Iterator[str]:
    pick, needed = plan.pick, plan.estimate
    if pick is None or needed is None:
        return
    yield from plan.step_of(pick).notes
    yield from needed.warnings
    if not pick.stays:
        yield host_said(plan)
    recipe = pick.recipe
    if pick.method == "full" and recipe.dtype != "fp32" and recipe.deepspeed is None:
        own = find_optimizer(recipe.optimizer).bits is None  # of the states: the weights' dtype
        yield (
            f"{'Weights, gradients and states' if own else 'Weights and gradients'} are "
            f"{recipe.dtype}: small updates round away. --dtype fp32 plans with fp32 weights"
            f"{_fp32_said(plan)}"
        )
    decided = plan.goal.lora
    open_dropout = not isinstance(decided, LoRA) and "dropout" not in (decided or {})
    if pick.method != "full" and open_dropout and not _dropout(pick):
        yield "LoRA without dropout: peft refuses dropout where experts are adapted"


def host_said(plan: Plan) -> str:
    """Where the limit of host memory is from."""
    size = format_bytes(plan.host_memory or 0)
    if plan.goal.host_memory is not None:
        return f"Host memory: {size}, as was said."
    if plan.gpus.indices:
        return f"Host memory: this machine has {size}."
    return f"Host memory: {size} are assumed; --host-memory sets another limit."


def _dropout(candidate: Candidate) -> float:
    lora = candidate.recipe.lora
    return lora.dropout if lora is not None else 0.0


def _fp32_said(plan: Plan) -> str:
    for candidate in plan.of_the_method:
        if candidate.recipe.dtype == "fp32":
            return (
                f", which {pace_said(plan, candidate)} ({format_bytes(candidate.required or 0)} "
                "required)"
            )
    return ", which do not fit here" if "dtype" not in plan.goal.pins else ""


def hours_said(hours: float) -> str:
    """ "3.2 h", "12 min"."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:,.1f} h"


def dollars_said(dollars: float) -> str:
    """ "$0.12", "$1,234"."""
    return f"${dollars:,.2f}" if dollars < 1000 else f"${dollars:,.0f}"


def count_said(count: int) -> str:
    """ "10M", "2.5B"."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= unit:
            return f"{count / unit:g}{suffix}" if count * 1000 % unit == 0 else f"{count:,}"
    return str(count)
