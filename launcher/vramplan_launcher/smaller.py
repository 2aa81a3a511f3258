"""The next smaller plans of a run: rung by rung, each teaching the model the same. Needs no torch.

The planner has better ones where it made the plan; these serve any recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vramplan.errors import UserError
from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.recipe import Recipe

_LEAST = 0.99
"""A rung needs at most so much of the one before it: less would be lost in the slack."""
_EIGHT_BIT = {"adamw": "paged_adamw_8bit", "lion": "paged_lion_8bit"}


def smaller(needed: Estimate, count: int, *, allow_8bit: bool = False) -> list[Estimate]:
    """At most `count` estimates, each needing less than the one before; the mildest change first.

    The effective batch, the sequence and what is trained stay as they are.
    """
    found: list[Estimate] = []
    current = needed
    while len(found) < count:
        following = next(_lower(current, allow_8bit), None)
        if following is None:
            break
        found.append(following)
        current = following
    return found


def _lower(current: Estimate, allow_8bit: bool) -> Iterator[Estimate]:
    for recipe in _rungs(current.recipe, allow_8bit):
        try:
            then = estimate(current.architecture, recipe, current.gpu)
        except UserError:
            continue  # the libraries refuse that one
        if then.required <= _LEAST * current.required:
            yield replace(then, id=current.id)


def _rungs(recipe: Recipe, allow_8bit: bool) -> Iterator[Recipe]:
    if recipe.allocator == "default":
        yield replace(recipe, allocator="expandable_segments")
    if recipe.attention == "eager":
        yield replace(recipe, attention="sdpa")
    if not recipe.gradient_checkpointing:
        yield replace(recipe, gradient_checkpointing=True)
    batch = recipe.batch_size
    parts = next((n for n in range(2, batch + 1) if batch % n == 0), None)
    if parts is not None:
        steps = recipe.gradient_accumulation_steps * parts
        yield replace(recipe, batch_size=batch // parts, gradient_accumulation_steps=steps)
    if allow_8bit:
        from vramplan.recipe.optimizers import OPTIMIZERS

        now = OPTIMIZERS[recipe.optimizer]
        lighter = _EIGHT_BIT.get(now.algorithm)
        if lighter is not None and now.bits != 8:
            yield replace(recipe, optimizer=lighter)
    yield from _offloaded(recipe)


def _offloaded(recipe: Recipe) -> Iterator[Recipe]:
    zero = recipe.deepspeed
    if zero is None or zero.stage == 0:
        return
    if zero.offload_optimizer is None:
        yield replace(recipe, deepspeed=replace(zero, offload_optimizer="cpu"))
    elif zero.stage == 3 and zero.offload_param is None:
        yield replace(recipe, deepspeed=replace(zero, offload_param="cpu"))
