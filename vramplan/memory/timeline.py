"""The live bytes through a step's phases, and where they are highest."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from vramplan.memory.optimizers import Stepping, stepping
from vramplan.memory.precision import Policy
from vramplan.memory.program import Point, Program, compile_step
from vramplan.memory.states import Layout, frozen, layout
from vramplan.models.architecture import Architecture
from vramplan.recipe.optimizers import find_optimizer

TOKEN = 8  # input_ids, labels and attention_mask are int64
INPUT_TENSORS = 3


class Phase(NamedTuple):
    """Bytes allocated at a phase's end, and the most within it."""

    end: int
    peak: int


class Parts(NamedTuple):
    """All of a run that does not depend on batch and sequence."""

    layout: Layout
    stepping: Stepping
    program: Program
    buckets: int = 0
    """DDP's flat copies of all gradients."""


@lru_cache(maxsize=1024)
def parts(arch: Architecture, policy: Policy, optimizer: str, allocator: str) -> Parts:
    """Compiled once; every estimate of that model and policy uses it."""
    weights, how = layout(arch, policy, allocator), find_optimizer(optimizer)
    others = frozen(arch, policy) if how.states_of_frozen else ()
    steps = stepping(how, weights, allocator, policy.projection, others)
    if policy.in_backward is None and policy.projection is not None:
        policy = replace(policy, projection=None)  # the tape knows nothing of it
    return Parts(weights, steps, compile_step(arch, policy))


class Timeline(NamedTuple):
    """A steady step: optimizer states are there, gradients come and go."""

    load: Phase
    """from_pretrained"""
    prepare: Phase
    """prepare_model_for_kbit_training and get_peft_model; wrapping by DDP or DeepSpeed"""
    forward: Phase
    backward: Phase
    optimizer_step: Phase
    """Up to the step's end; zero_grad frees the gradients after it."""
    resident: int
    """Weights, states, workspaces and inputs: what a step starts with."""
    held_gradients: int
    """Gradients of earlier micro-batches that forward starts with."""
    points: tuple[Point, ...]

    def phases(self) -> dict[str, Phase]:
        return {
            "load": self.load,
            "prepare": self.prepare,
            "forward": self.forward,
            "backward": self.backward,
            "optimizer_step": self.optimizer_step,
        }

    @property
    def peak(self) -> int:
        """A maximum over instants of all phases."""
        return max(phase.peak for phase in self.phases().values())

    @property
    def peak_phase(self) -> str:
        """The first phase that reaches the peak."""
        return next(name for name, p in self.phases().items() if p.peak == self.peak)


def run_timeline(run: Parts, batch: int, seq: int, accumulation: int, workspace: int) -> Timeline:
    """The phases of a step of `accumulation` micro-batches of batch x seq tokens.

    The last of them is told: the first finds no gradients of others, and so needs no more at any
    instant.
    """
    weights, step = run.layout, run.stepping
    inputs = INPUT_TENSORS * TOKEN * batch * seq * accumulation
    resident = weights.weights + run.buckets + step.states + workspace + inputs
    gradients = 0 if step.in_backward else weights.gradients
    held = gradients if accumulation > 1 else 0
    points = run.program.walk(batch, seq)
    forward = _phase(points, "forward", resident + held)
    backward = _phase(points, "backward", resident + held)
    stepped = resident + gradients
    return Timeline(
        load=Phase(weights.loaded, weights.load_peak),
        prepare=Phase(weights.weights + run.buckets, weights.prepare_peak),
        forward=forward,
        backward=backward,
        optimizer_step=Phase(stepped - step.released, stepped + step.transient),
        resident=resident,
        held_gradients=held,
        points=tuple(points),
    )


def _phase(points: list[Point], name: str, base: int) -> Phase:
    mine = [p for p in points if p.section.phase == name]
    return Phase(base + mine[-1].end, base + max(p.peak for p in mine))
