"""What an optimizer's step takes: clipping, the update, and the host's loops over parameters."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vramplan.hardware.gpu import Gpu
from vramplan.memory.optimizer_states import state_tensors
from vramplan.memory.precision import Policy
from vramplan.memory.states import Trained, layout
from vramplan.models.architecture import Architecture
from vramplan.recipe.optimizers import LIBRARIES, Optimizer, find_optimizer
from vramplan.timing import rates as r
from vramplan.timing.rates import Rates, rates_of

FOREACH = 2.6
"""A foreach AdamW goes through memory so many times as often as a fused one: 16.2 ms against 6.4,
27.0 against 10.0 (1.24e9 parameters in bf16, in fp32)."""
ADAPTER_TENSORS = 2


class Step(NamedTuple):
    """Seconds of an optimizer's step on one card."""

    card: float
    """Clipping and the update."""
    host: float
    """Launching the update."""
    before: float
    """The card waits: gradients are collected."""
    after: float
    """The card waits: zero_grad, the scheduler."""
    start: float
    """The card waits at the start of every micro-batch."""
    gradients: int
    """Bytes of all gradients."""
    elements: int
    """Trained parameters."""
    tensors: int
    """What they come in."""


@lru_cache(maxsize=1024)
def step_of(arch: Architecture, policy: Policy, optimizer: str, gpu: Gpu) -> Step:
    """Of `optimizer` on the trained parameters of `arch` under `policy`."""
    rates, kind = rates_of(gpu), find_optimizer(optimizer)
    trained = layout(arch, policy, "default").trained
    tensors = sum(t.count for t in trained)
    adapted = tensors // ADAPTER_TENSORS if policy.rank is not None else 0
    card = sum(t.count * (_clip(t, rates) + _update(kind, t, rates)) for t in trained)
    before = r.STEP + tensors * r.STEP_TENSOR + adapted * r.STEP_ADAPTED
    after = tensors * r.STEPPED_TENSOR + adapted * r.STEPPED_ADAPTED
    start = r.MICRO_BATCH + tensors * r.MICRO_BATCH_TENSOR + adapted * r.MICRO_BATCH_ADAPTED
    return Step(
        card=card,
        host=rates.host * tensors * r.UPDATE_TENSOR[_loop(kind)],
        before=rates.host * before,
        after=rates.host * after,
        start=rates.host * start,
        gradients=sum(t.count * t.numel * t.itemsize for t in trained),
        elements=sum(t.count * t.numel for t in trained),
        tensors=tensors,
    )


def _loop(kind: Optimizer) -> str:
    """How the host goes through the parameters: a key of UPDATE_TENSOR."""
    if kind.factored or kind.package not in LIBRARIES:
        return "python"
    return kind.stepping


def _clip(t: Trained, rates: Rates) -> float:
    """clip_grad_norm_: the norm reads the gradients, scaling reads and writes them."""
    return 3 * t.numel * t.itemsize / rates.several[t.itemsize]


def _update(kind: Optimizer, t: Trained, rates: Rates) -> float:
    """Weight, gradient and states are read, weight and states written."""
    if kind.factored:
        return t.numel / rates.updates["adafactor"]
    if kind.on_host:
        return kind.states * 2 * t.numel * t.itemsize / r.PAGEABLE
    states = 0 if kind.low_rank else sum(n for n, _ in state_tensors(kind, t))
    moved = (3 * t.numel * t.itemsize + 2 * states) / rates.several[t.itemsize]
    if kind.package == "bitsandbytes":
        eight = kind.bits == 8 and not t.embedding
        name = "adamw 32" if not eight else "lion 8" if kind.states == 1 else "adamw 8"
        return max(moved, t.numel / rates.updates[name]) + rates.kernel
    fused = kind.stepping == "fused" or not kind.states
    return moved if fused else moved * FOREACH
