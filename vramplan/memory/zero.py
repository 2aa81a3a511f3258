"""From a recipe with DeepSpeed to the parts of its estimate."""

from __future__ import annotations

from vramplan.memory.allocator import workspaces
from vramplan.memory.optimizers import Stepping
from vramplan.memory.precision import Policy
from vramplan.memory.sharding import Sharded, sharded
from vramplan.memory.states import layout
from vramplan.memory.timeline import Parts, Timeline
from vramplan.memory.zero_timeline import zero_timeline
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
    mine = whole._replace(
        loaded=part.loaded,
        load_peak=part.load_peak,
        weights=part.weights,
        prepare_peak=part.initialized_peak,
        gradients=part.arriving,
    )
    stepping = Stepping(states=part.masters + part.states, managed=0, transient=part.step)
    return Parts(mine, stepping, part.last.program), part


def zero_estimate(
    arch: Architecture,
    policy: Policy,
    recipe: Recipe,
    capability: str | None,
    rank: int | None,
) -> tuple[Parts, Sharded, Timeline, int]:
    """Parts, timeline and workspaces of a rank; None: of the one that needs most."""
    zero = recipe.deepspeed
    assert zero is not None
    batch, seq, steps = recipe.batch_size, recipe.seq_len, recipe.gradient_accumulation_steps
    found = []
    for number in ranks_to_look_at(recipe, zero) if rank is None else (rank,):
        run, part = zero_parts(arch, policy, recipe, zero, number)
        workspace = workspaces(capability, run.program.epilogues)
        found.append((run, part, zero_timeline(part, batch, seq, steps, workspace), workspace))
    return max(found, key=lambda each: each[2].peak)


def ranks_to_look_at(recipe: Recipe, zero: DeepSpeed) -> tuple[int, ...]:
    """Ranks that can need most. In stages 1 and 2 the last one's gradients come first in backward,
    when most activations live; the first one may own part of a large embedding."""
    if zero.stage in (1, 2) and recipe.world_size > 1:
        return 0, recipe.world_size - 1
    return (0,)
