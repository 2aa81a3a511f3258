"""Per rank under ZeRO: what stays on the GPU and on the host, and what a step adds for a while."""

from __future__ import annotations

from functools import lru_cache

from vramplan.memory.precision import Policy
from vramplan.memory.zero_part import Part, Sharded
from vramplan.memory.zero_stage_0 import stage_0
from vramplan.memory.zero_stage_3 import stage_3
from vramplan.memory.zero_stage_12 import stage_1_and_2
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import find_optimizer

__all__ = ["Sharded", "sharded"]


@lru_cache(maxsize=1024)
def sharded(
    arch: Architecture,
    policy: Policy,
    optimizer: str,
    allocator: str,
    zero: DeepSpeed,
    ranks: tuple[int, int],
    accumulation: int,
) -> Sharded:
    """What a rank holds, `ranks` being its number and how many there are.

    Nothing here depends on batch or sequence.
    """
    part = Part(arch, policy, find_optimizer(optimizer), allocator, zero, ranks, accumulation)
    if zero.stage == 3:
        return stage_3(part)
    return stage_1_and_2(part) if zero.stage else stage_0(part)
