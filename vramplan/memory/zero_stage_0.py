"""Stage 0: DeepSpeed's engine without partitions, each rank with all of the model.

Source: DeepSpeed 0.19.8, runtime/fp16/fused_optimizer.py (FP16_Optimizer, which bf16 takes too);
the fp32 engine leaves weights and gradients to the optimizer.
"""

from __future__ import annotations

from dataclasses import replace

from vramplan.memory.optimizer_states import FP32
from vramplan.memory.program import compile_step
from vramplan.memory.zero_extras import extras_of
from vramplan.memory.zero_part import Part, Run, Sharded, nothing


def stage_0(part: Part) -> Sharded:
    """Flat weights and masters; a step of zeros makes the states at once."""
    count = sum(w.numel for w in part.trained)
    moved, gradients = part.each(part.list), part.each(part.trained)
    loaded, load_peak, prepared = part.loading()
    if part.width == FP32:
        weights, masters, initialized, peak = moved, 0, moved, moved
        states = sum(part.states_of(w.numel) for w in part.trained)
        step = sum(part.stepping(w.numel) for w in part.trained)
    else:
        weights = part.each(part.frozen()) + part.up(count * part.width)
        masters, states = part.up(count * FP32), part.states_of(count)
        initialized = weights + masters + states
        # step: every gradient in fp32, then all of them flat while the 16-bit ones are there
        step = sum(part.up(w.numel * FP32) for w in part.trained) + part.up(count * FP32)
        peak = max(
            moved + gradients + part.up(count * part.width),  # clones, flattened
            initialized + part.up(count * FP32) + part.stepping(count),  # the step of zeros
        )
    program = compile_step(part.arch, part.policy)
    last = Run(program, extras_of(program, nothing, nothing))
    others: tuple[Run, ...] = ()
    if part.accumulation > 1:
        alone = compile_step(part.arch, replace(part.policy, accumulating=False))
        last = last._replace(held=gradients)
        others = (Run(alone, extras_of(alone, nothing, nothing)),)
    return Sharded(
        rank=part.rank,
        weights=weights,
        masters=masters,
        states=states,
        buffers=0,
        gradients=0,
        loaded=loaded,
        load_peak=load_peak,
        initialized=initialized,
        initialized_peak=max(peak, prepared),
        arriving=gradients,
        step=gradients + step,
        host=part.host(),
        flat=part.flat,
        last=last,
        others=others,
    )
