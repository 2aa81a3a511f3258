"""Decisions that leave no recipe: which two contradict each other, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from vramplan.errors import IllegalRecipe, UserError
from vramplan.planner.goal import METHODS, Goal, contradiction
from vramplan.planner.space import Refusal, Space
from vramplan.recipe.recipe import LoRA


def explain_emptiness(space: Space, late: Sequence[Refusal] = ()) -> UserError:
    """The error for a space without a single legal recipe. `late`: refusals of what seemed legal
    until its sizes were known."""
    if late:
        return IllegalRecipe(f"what is decided leaves no legal recipe: {late[0].reason}")
    goal = space.goal
    if not space.deals():
        said = [f"{name} {goal.pins[name]}" for name in _BATCH if name in goal.pins]
        cards = f"{space.count} card{'s' if space.count > 1 else ''}"
        why = f"on up to {cards} no accumulation makes it"
        raise contradiction(" x ".join(said), f"effective batch {goal.effective_batch}", why)
    decisions = _decisions(goal)
    for one in decisions:
        found = _empty(space, (one,))
        if found is not None:
            return IllegalRecipe(f"{_said(one)} leaves no legal recipe: {found}")
    for pair in combinations(decisions, 2):
        found = _empty(space, pair)
        if found is not None:
            return contradiction(_said(pair[0]), _said(pair[1]), found.rstrip("."))
    reason = space.refused[-1].reason if space.refused else "no card count divides the batch"
    return IllegalRecipe(f"what is decided leaves no legal recipe: {reason}")


_BATCH = ("batch_size", "gradient_accumulation_steps", "world_size")


def _decisions(goal: Goal) -> list[tuple[str, Any]]:
    """What the user decided, by name."""
    # A sequence is too long whatever else there is, so it is looked at first.
    found: list[tuple[str, Any]] = [("seq_len", goal.seq_len), *goal.pins.items()]
    if goal.methods is not None:
        found.append(("methods", goal.methods))
    if goal.lora is not None:
        found.append(("lora", goal.lora))
    return found


def _empty(space: Space, decisions: tuple[tuple[str, Any], ...]) -> str | None:
    """The reason why these alone leave nothing; None: they leave something."""
    pins = {k: v for k, v in decisions if k not in ("methods", "lora", "seq_len")}
    others = {k: v for k, v in decisions if k in ("methods", "lora", "seq_len")}
    if "lora" in others:  # decides nothing of full fine-tuning
        others = {"methods": tuple(m for m in METHODS if m != "full"), **others}
    base = Goal(effective_batch=space.goal.effective_batch, seq_len=space.goal.seq_len)
    try:
        trial = Space(space.arch, space.gpu, space.count, replace(base, pins=pins, **others))
        if any(True for _ in trial.drafts()):
            return None
    except UserError as error:
        return str(error)
    if not trial.refused:
        return "no micro-batch is left"
    usual = Space(space.arch, space.gpu, space.count, base)
    list(usual.drafts())  # what is refused whatever is decided
    reasons = [refusal.reason for refusal in trial.refused if refusal not in usual.refused]
    return (reasons or [trial.refused[0].reason])[0]


def _said(decision: tuple[str, Any]) -> str:
    name, value = decision
    if name == "methods":
        return f"method {' or '.join(value)}"
    if name == "lora":
        fields = value.to_dict() if isinstance(value, LoRA) else value
        return f"LoRA with {', '.join(f'{name} {fields[name]}' for name in fields)}"
    if name == "seq_len":
        return f"sequence length {value}"
    if name == "deepspeed":
        return "no DeepSpeed" if value is None else f"DeepSpeed stage {value.stage}"
    if name == "zero":
        return "no ZeRO" if value is None else f"ZeRO stage {value}"
    return f"{name} {'none' if value is None else value}"
