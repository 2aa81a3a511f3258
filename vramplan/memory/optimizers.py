"""Optimizer states and what a step needs while it runs.

Sources: torch.optim of torch 2.11-2.13 (`_multi_tensor_*`, `_fused_*`); transformers 5.17
optimization.py (Adafactor.step); bitsandbytes 0.50 optim/optimizer.py and optim/ademamix.py
(init_state, get_state_buffer).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.reduction import buffer_bytes
from vramplan.memory.states import Layout, Trained
from vramplan.recipe.optimizers import (
    BNB_BLOCK_ELEMENTS,
    BNB_CODE_TABLE_ELEMENTS,
    BNB_MIN_8BIT_ELEMENTS,
    BNB_MIN_PAGED_ELEMENTS,
    Optimizer,
)

FP32 = 4
# Temporaries as large as all parameters that a foreach step makes besides updating in place.
# adam.py: exp_avg_sq_sqrt; rmsprop.py: avg; adagrad.py: std and numerator; sgd.py: none.
FOREACH_TEMPORARIES = {"adamw": 1, "rmsprop": 1, "adagrad": 2, "sgd": 0}


class Stepping(NamedTuple):
    """Bytes of an optimizer."""

    states: int
    """On the GPU's counters from the first step on."""
    managed: int
    """In CUDA managed memory: not counted by torch, moved to the host under pressure."""
    transient: int
    """While a step runs, beyond weights, gradients and states."""
    largest: int = 0
    """The largest single temporary of a step that goes parameter by parameter."""


def stepping(optimizer: Optimizer, layout: Layout, allocator: str) -> Stepping:
    """What `optimizer` costs for the trained parameters of `layout`."""
    states = managed = 0
    for t in layout.trained:
        for nbytes, paged in state_tensors(optimizer, t):
            if paged:
                managed += t.count * nbytes
            else:
                states += t.count * rounded(nbytes, allocator)
    if optimizer.package == "bitsandbytes" and optimizer.bits == 8:
        states += optimizer_tables(optimizer)
    largest = max((t.numel for t in layout.trained), default=0) * FP32
    return Stepping(
        states,
        managed,
        _transient(optimizer, layout, allocator),
        rounded(largest, allocator) if optimizer.factored else 0,
    )


def optimizer_tables(optimizer: Optimizer) -> int:
    """The code tables that all 8-bit states share: one for signed, one for unsigned values."""
    tables = 1 if optimizer.states == 1 else 2
    return tables * rounded(BNB_CODE_TABLE_ELEMENTS * FP32)


def state_tensors(optimizer: Optimizer, t: Trained) -> Iterator[tuple[int, bool]]:
    """(bytes, whether paged) of every state tensor of one parameter."""
    if optimizer.factored and len(t.shape) > 1:
        yield t.numel // t.shape[-1] * FP32, False
        yield t.numel // t.shape[-2] * FP32, False
        return
    if optimizer.package == "bitsandbytes":
        yield from _bitsandbytes_states(optimizer, t)
        return
    itemsize = FP32 if optimizer.bits == 32 else t.itemsize
    for _ in range(optimizer.states):
        yield t.numel * itemsize, False
    if optimizer.step_on_gpu:
        yield FP32, False


def _bitsandbytes_states(optimizer: Optimizer, t: Trained) -> Iterator[tuple[int, bool]]:
    small = t.numel < BNB_MIN_8BIT_ELEMENTS
    eight = optimizer.bits == 8 and not small and not t.embedding
    buffers = (2, 1) if optimizer.algorithm == "ademamix" else (1,) * optimizer.states
    for width in buffers:
        numel = width * t.numel
        paged = optimizer.paged and t.numel >= BNB_MIN_PAGED_ELEMENTS
        yield numel * (1 if eight else FP32), paged
        if eight:
            yield width * -(-t.numel // BNB_BLOCK_ELEMENTS) * FP32, False


def _transient(optimizer: Optimizer, layout: Layout, allocator: str) -> int:
    if optimizer.factored:
        return _adafactor(layout, allocator)
    if optimizer.stepping != "foreach":
        return 0
    return FOREACH_TEMPORARIES[optimizer.algorithm] * layout.gradients


def _adafactor(layout: Layout, allocator: str) -> int:
    """Adafactor.step: per parameter fp32 copies of gradient and weight (if 16-bit), and `update`.

    `(grad**2) + eps` makes two tensors while the previous parameter's `update` is still bound.
    """
    peak = previous = 0
    for t in layout.trained:
        if len(t.shape) < 2:
            continue  # biases and norms come last: Trainer puts them in a group of their own
        size = rounded(t.numel * FP32, allocator)
        copies = 2 * size if t.itemsize < FP32 else 0
        columns = t.shape[-1]
        mean = buffer_bytes(columns, t.numel // columns)  # update.mean(dim=-2)
        peak = max(peak, copies + previous + 2 * size, copies + size + mean)
        previous = size
    return peak
