"""The tape of a step whose optimizer steps within backward, and lets each gradient go.

Layerwise optimizers: a hook behind AccumulateGrad steps its parameter (transformers 5.17,
trainer_optimizer.py, _setup_low_rank_optimizer; functions/accumulate_grad.cpp in torch 2.11-2.13:
the gradient that came in lives until the hook has returned). LOMO (lomo-optim 0.1.1, lomo.py): a
hook before AccumulateGrad steps whatever has a gradient, that is the parameter before; the last
one is stepped when backward is through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from vramplan.memory.optimizer_steps import STEPS, LowRank
from vramplan.memory.optimizers import projections
from vramplan.memory.precision import Policy
from vramplan.memory.record import Mark, Recorder, Recording, record_on
from vramplan.memory.states import Trained, layout
from vramplan.memory.values import Parameter, Storage, Value
from vramplan.models.architecture import Architecture
from vramplan.recipe.optimizers import OPTIMIZERS

_LAYER = re.compile(r"\.\d+\.")


class OnTape:
    """A step's variables as storages of the tape (the Frame of optimizer_steps.py)."""

    def __init__(self, tape: SteppingRecorder, parameter: Parameter) -> None:
        self.tape, self.parameter = tape, parameter
        self.bound: dict[str, Storage | None] = {}
        self.held: list[Storage | None] = []

    def let(self, **tensors: int) -> None:
        new = {name: self._made(nbytes) for name, nbytes in tensors.items()}
        self.bound.update(new)

    def beside(self, *tensors: int) -> None:
        made = [self._made(nbytes) for nbytes in tensors]
        made.clear()

    def drop(self, *names: str) -> None:
        for name in names:
            self.bound.pop(name, None)

    def free_gradient(self, nbytes: int) -> None:
        self.parameter.grad = None

    def hold(self, nbytes: int) -> None:
        self.held.append(self._made(nbytes))

    def _made(self, nbytes: int) -> Storage | None:
        return self.tape.scratch(nbytes) if nbytes else None


class SteppingRecorder(Recorder):
    """A recorder whose parameters are stepped as soon as they have a gradient."""

    def prepare(self, trained: Sequence[Trained]) -> SteppingRecorder:
        """To be called first, with what the policy trains."""
        optimizer = OPTIMIZERS[self.policy.in_backward or ""]
        self.step = STEPS[optimizer.name]
        self.after = optimizer.low_rank is not None
        lows = projections(trained, self.policy.projection)
        self.known: dict[tuple[str, int], tuple[Trained, LowRank | None]] = {
            (t.module, t.numel): (t, lows.get(t)) for t in trained
        }
        self.pending: list[Parameter] = []
        return self

    def scratch(self, nbytes: int) -> Storage:
        """A tensor of the optimizer's own."""
        return self.allocate((nbytes, 0, 0), "temporary")

    def leaf(self, parameter: Parameter) -> Value:
        fresh = parameter.node is None
        value = super().leaf(parameter)
        if fresh and parameter.node is not None:
            parameter.node.backward = self._hooked(parameter, parameter.node.backward)
        return value

    def backward(self, loss: Value) -> None:
        super().backward(loss)
        self._step_pending()

    def _mark_backward(self, forward: Mark) -> None:
        """What waits is stepped where its layer ends: in the next layer's section it would count
        as often as that one repeats. It is a norm's weight, mostly."""
        self._step_pending()
        super()._mark_backward(forward)

    def _hooked(self, parameter: Parameter, accumulate: Callable[..., Any]) -> Callable[..., Any]:
        def backward(grad: Value) -> tuple[()]:
            if not self.after:
                self._step_pending()
            accumulate(grad)
            self.pending.append(parameter)
            if self.after:
                self._step_pending()
            return ()

        return backward

    def _step_pending(self) -> None:
        while self.pending:
            parameter = self.pending.pop()
            module = _LAYER.sub(".{layer}.", parameter.name.removesuffix(".weight"), count=1)
            t, low = self.known[module, parameter.size.numel]
            self.step(OnTape(self, parameter), t, low)
            parameter.grad = None


def record_stepping(arch: Architecture, policy: Policy) -> Recording:
    """Record one micro-batch whose optimizer steps in backward."""
    return record_on(SteppingRecorder(policy).prepare(trained_of(arch, policy)), arch)


def trained_of(arch: Architecture, policy: Policy) -> tuple[Trained, ...]:
    return layout(arch, policy, "expandable_segments").trained
