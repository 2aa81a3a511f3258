"""From a recipe with DeepSpeed to the parts of its estimate."""

from __future__ import annotations

from dataclasses import replace

from vramplan.memory.optimizers import Stepping
from vramplan.memory.precision import Policy
from vramplan.memory.sharding import Sharded, sharded
from vramplan.memory.states import layout
from vramplan.memory.timeline import Parts
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import Recipe


def zero_parts(
    arch: Architecture, policy: Policy, recipe: Recipe, zero: DeepSpeed, rank: int = 0
) -> tuple[Parts, Sharded]:
    """A rank's parts: the weights that it keeps, its states, the program of its step."""
    steps = recipe.gradient_accumulation_steps
    ranks = (rank, recipe.world_size)
    part = sharded(arch, policy, recipe.optimizer, recipe.allocator, zero, ranks, steps)
    whole = layout(arch, policy, recipe.allocator)
    mine = replace(
        whole,
        loaded=part.loaded,
        load_peak=part.load_peak,
        weights=part.weights,
        prepare_peak=part.initialized_peak,
        gradients=part.arriving,
    )
    stepping = Stepping(states=part.masters + part.states, managed=0, transient=part.step)
    return Parts(mine, stepping, part.program, part.first), part


def ranks_to_look_at(recipe: Recipe, zero: DeepSpeed) -> tuple[int, ...]:
    """Ranks that can need most. In stages 1 and 2 the last one's gradients come first in backward,
    when most activations live; the first one may own part of a large embedding."""
    if zero.stage in (1, 2) and recipe.world_size > 1:
        return 0, recipe.world_size - 1
    return (0,)
