"""Stage 3's gathered weights: which are whole on the GPU, and when.

From the second step on the order of modules is known, and weights are gathered ahead as long as
fewer than `stage3_max_live_parameters` elements are whole. The gathering runs ahead through
forward's end into backward's modules, so the head and its loss find the limit reached, and one
parameter beyond it.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (fetch_sub_module,
__params_to_release).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.ranks import Weight


class Gathered(NamedTuple):
    """Bytes of weights that are whole, by section of the step."""

    at_head: int
    layers: tuple[int, ...]
    """Each layer's weights."""
    behind: tuple[int, ...]
    """The weights that backward still needs when it is in a layer: its and those before it."""
    kept: int
    """An embedding that is tied to the head and stays from one to the other."""
    inputs: int
    full_from: int
    """The first layer that with those before it reaches what the head has."""

    def at(self, phase: str, layer: int | None) -> int:
        """Bytes in a layer's forward or backward; None: at the head."""
        if layer is None:
            return self.at_head
        if layer < 0:
            return self.inputs
        if phase == "forward":
            return min(self.at_head, self.kept + self.layers[layer])
        return min(self.at_head, self.behind[layer])


def gathered(
    weights: Sequence[Weight],
    layers: int,
    *,
    persistent: int,
    max_live: int,
    max_reuse: int,
    checkpointing: bool,
    allocator: str,
) -> Gathered:
    """`persistent`: weights of at most so many elements are always whole, and not counted here."""
    moving = [w for w in weights if w.numel > persistent and not w.packed]

    def nbytes(some: Sequence[Weight]) -> int:
        return sum(rounded(w.nbytes, allocator) for w in some)

    by_layer: list[list[Weight]] = [[] for _ in range(layers)]
    for w in moving:
        if 0 <= w.layer < layers:
            by_layer[w.layer].append(w)
    before = [w for w in moving if w.layer < 0]
    heads = [w for w in moving if w.layer >= layers]
    tied = not any(w.role == "head" for w in weights)
    if tied:
        heads = [w for w in before if w.role == "embedding"][:1] + heads
    live, at_head = 0, 0
    for w in _in_backward(heads, by_layer, checkpointing):
        if live >= max_live:
            break
        live += w.numel
        at_head += rounded(w.nbytes, allocator)
    inside = sum(w.numel for layer in by_layer for w in layer)
    kept = nbytes(heads) if tied and inside < max_reuse else 0
    sizes = tuple(nbytes(layer) for layer in by_layer)
    behind, total = [], max(nbytes(before), nbytes(heads) if tied else 0)
    for size in sizes:
        total += size
        behind.append(total)
    full_from = bisect_left(behind, at_head)
    return Gathered(at_head, sizes, tuple(behind), kept, nbytes(before), full_from)


def _in_backward(
    heads: list[Weight], by_layer: list[list[Weight]], checkpointing: bool
) -> list[Weight]:
    """The order in which backward asks for weights.

    A checkpointed layer is run again when its last linear unpacks what it saved: that one is asked
    for first, then all others as in forward.
    """
    out = list(heads)
    for layer in reversed(by_layer):
        if checkpointing:
            last = max((k for k, w in enumerate(layer) if w.role != "adapter"), default=0)
            out += (*layer[last:], *layer[:last])
        else:
            out += reversed(layer)
    return out
