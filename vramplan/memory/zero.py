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
    arch: Architecture, policy: Policy, recipe: Recipe, zero: DeepSpeed
) -> tuple[Parts, Sharded]:
    """The first rank's parts: the weights that it keeps, its states, the program of its step."""
    steps = recipe.gradient_accumulation_steps
    part = sharded(arch, policy, recipe.optimizer, recipe.allocator, zero, recipe.world_size, steps)
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
