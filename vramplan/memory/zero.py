"""From a recipe with DeepSpeed to the parts of its estimate."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from vramplan.memory.allocator import workspaces
from vramplan.memory.optimizers import Stepping
from vramplan.memory.precision import Policy
from vramplan.memory.ranks import flat_of, weights_in_order
from vramplan.memory.sharding import Sharded, sharded
from vramplan.memory.states import layout
from vramplan.memory.timeline import Parts, Timeline
from vramplan.memory.zero_timeline import zero_timeline
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import Recipe

STEPS = 3  # micro-batches: the first, the last, and those between them, which are all alike
LARGEST = 3  # parameters: embedding, head and one more


def zero_parts(
    arch: Architecture, policy: Policy, recipe: Recipe, zero: DeepSpeed, rank: int = 0
) -> tuple[Parts, Sharded]:
    """A rank's parts: the weights that it keeps, its states, the program of its step."""
    steps = min(recipe.gradient_accumulation_steps, STEPS)
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
    looked_at = ranks_to_look_at(arch, policy, recipe, zero) if rank is None else (rank,)
    for number in looked_at:
        run, part = zero_parts(arch, policy, recipe, zero, number)
        workspace = workspaces(capability, run.program.epilogues)
        found.append((run, part, zero_timeline(part, batch, seq, steps, workspace), workspace))
    return max(found, key=lambda each: each[2].peak)


def ranks_to_look_at(
    arch: Architecture, policy: Policy, recipe: Recipe, zero: DeepSpeed
) -> tuple[int, ...]:
    """Ranks that can need most.

    In stages 1 and 2 the last one's gradients come first in backward, when most activations live.
    And a parameter belongs whole to each rank that owns a piece of it: the ranks in which the
    largest ones begin and end have those and their neighbours'.
    """
    ranks = recipe.world_size
    if zero.stage not in (1, 2) or ranks == 1:
        return (0,)
    return _at_the_largest(arch, policy, recipe.allocator, ranks)


@lru_cache(maxsize=1024)
def _at_the_largest(
    arch: Architecture, policy: Policy, allocator: str, ranks: int
) -> tuple[int, ...]:
    weights = [w for w in weights_in_order(arch, policy, allocator) if w.trains]
    part = flat_of([weights], ranks, ()).part
    ends = list(accumulate(w.numel for w in weights))
    order = sorted(range(len(weights)), key=lambda i: (-weights[i].numel, i))
    found = {0, ranks - 1}
    for i in (*order[:LARGEST], order[len(order) // 2]):
        found.update(((ends[i] - weights[i].numel) // part, (ends[i] - 1) // part))
    return tuple(sorted(n for n in found if n < ranks))
