"""What an optimizer keeps for a parameter from its first step on.

Sources: torch.optim of torch 2.11-2.13; transformers 5.17 optimization.py (Adafactor); bitsandbytes
0.50 optim/optimizer.py and optim/ademamix.py (init_state, get_state_buffer); torchao 0.18
optim/adam.py (_new_buffer), subclass_4bit.py, subclass_8bit.py; galore-torch 1.0
galore_projector.py; apollo-torch 1.0.3 random_projector.py, apollo.py; lomo-optim 0.1.1 adalomo.py;
schedulefree 1.4.1; torch-optimi 0.3.3 stableadamw.py (_init_state).
"""

from __future__ import annotations

from collections.abc import Iterator

from vramplan.memory.allocator import rounded
from vramplan.memory.optimizer_steps import LowRank
from vramplan.memory.states import Trained
from vramplan.recipe.optimizers import (
    BNB_BLOCK_ELEMENTS,
    BNB_CODE_TABLE_ELEMENTS,
    BNB_MIN_8BIT_ELEMENTS,
    BNB_MIN_PAGED_ELEMENTS,
    TORCHAO_BLOCK_ELEMENTS,
    Optimizer,
    torchao_quantizes,
)

FP32 = 4
SCALAR = 4
_OF_BITSANDBYTES = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise")
Tensors = Iterator[tuple[int, bool]]


def optimizer_tables(optimizer: Optimizer) -> int:
    """The code tables that all 8-bit states share: one for signed, one for unsigned values.

    Layerwise optimizers, one a parameter, share nothing: state_tensors has theirs.
    """
    if optimizer.bits != 8 or optimizer.package == "torchao" or _layerwise(optimizer):
        return 0
    return _tables(optimizer) * rounded(BNB_CODE_TABLE_ELEMENTS * FP32)


def _tables(optimizer: Optimizer) -> int:
    return 1 if optimizer.states == 1 else 2


def _layerwise(optimizer: Optimizer) -> bool:
    return optimizer.stepping == "in_backward"


def state_tensors(optimizer: Optimizer, t: Trained, low: LowRank | None = None) -> Tensors:
    """(bytes, whether paged) of every state tensor of one parameter, in device memory.

    `low`: the projection of its gradient, where it has one.
    """
    if optimizer.on_host:
        return
    if low is not None:
        yield from _projection(optimizer, t, low)
    numel, shape = (low.numel, low.shape) if low else (t.numel, t.shape)
    if optimizer.package == "torchao":
        yield from _torchao(optimizer, t)
    elif optimizer.package == "bitsandbytes" or optimizer.name in _OF_BITSANDBYTES:
        yield from _bitsandbytes(optimizer, t, numel)
    else:
        yield from _plain(optimizer, t, numel, shape)


def _plain(optimizer: Optimizer, t: Trained, numel: int, shape: tuple[int, ...]) -> Tensors:
    itemsize = FP32 if optimizer.bits == 32 else t.itemsize
    if optimizer.factored and len(shape) > 1:
        yield numel // shape[-1] * FP32, False
        yield numel // shape[-2] * FP32, False
    else:
        for _ in range(optimizer.states):
            yield numel * itemsize, False
    if optimizer.algorithm == "adafactor":
        yield SCALAR, False  # RMS
    if optimizer.step_on_gpu:
        yield SCALAR, False
    if optimizer.compensated:
        # A Kahan compensation, or a byte in its place; eps squared; a sum of squares.
        yield numel * t.itemsize if t.itemsize < FP32 else 1, False
        yield from ((t.itemsize, False), (SCALAR, False))


def _projection(optimizer: Optimizer, t: Trained, low: LowRank) -> Tensors:
    """A rank's rows of V or columns of U. Where they need no cast they are views: all of it stays.

    APOLLO draws a matrix of its own, and keeps the norm of the last step's gradient.
    """
    gradient = FP32 if optimizer.bits == 32 else t.itemsize
    if optimizer.low_rank == "random":
        yield low.matrix * gradient, False
        yield gradient, False
    elif gradient < FP32:
        yield low.matrix * gradient, False
    else:
        side = min(low.rows, low.columns)
        yield side * (low.columns if low.right else low.rows) * FP32, False


def _bitsandbytes(optimizer: Optimizer, t: Trained, numel: int) -> Tensors:
    small = numel < BNB_MIN_8BIT_ELEMENTS
    wide = optimizer.embeddings_in_32_bits and t.embedding
    eight = optimizer.bits == 8 and not small and not wide
    buffers = (2, 1) if optimizer.algorithm == "ademamix" else (1,) * optimizer.states
    for width in buffers:
        paged = optimizer.paged and numel >= BNB_MIN_PAGED_ELEMENTS
        yield width * numel * (1 if eight else FP32), paged
        if eight:
            yield width * -(-numel // BNB_BLOCK_ELEMENTS) * FP32, False
        if eight and _layerwise(optimizer):
            yield BNB_CODE_TABLE_ELEMENTS * FP32, False
    if optimizer.low_rank:
        # galore-torch 1.0 hands bitsandbytes 0.50 its percentile_clipping as max_unorm: unorm_vec
        yield SCALAR, False


def _torchao(optimizer: Optimizer, t: Trained) -> Tensors:
    """Codes, an fp32 scale a block and a table of codes, for each state its own."""
    bits = optimizer.bits or 8
    if not torchao_quantizes(t.numel):
        yield from ((t.numel * t.itemsize, False) for _ in range(optimizer.states))
        return
    for _ in range(optimizer.states):
        yield t.numel * bits // 8, False
        yield t.numel // TORCHAO_BLOCK_ELEMENTS * FP32, False
        yield 2**bits * FP32, False
