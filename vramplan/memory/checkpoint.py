"""What a checkpointed call keeps of its saved tensors: how to compute them again.

Source: torch/utils/checkpoint.py (non-reentrant checkpointing with early stop); torch 2.11-2.13.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from vramplan.memory.values import Node, Storage


class StopRecomputation(Exception):
    """Raised when a checkpointed block has recomputed all that backward will ask for."""


class Holder:
    """What a node of a checkpointed call holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "frame", "position")

    def __init__(self, frame: Frame, position: int) -> None:
        self.frame, self.position = frame, position


class Frame:
    """One checkpointed call: recomputes its saved tensors when backward first asks for one.

    What nodes saved that died in forward already (nothing depended on them) is computed again,
    but not kept.
    """

    __slots__ = ("count", "holders", "recompute", "recomputed")

    def __init__(self, recompute: Callable[[Frame], Any]) -> None:
        self.recompute = recompute  # takes the frame: holding it would be a cycle
        self.recomputed: dict[int, Storage | None] | None = None
        self.holders: list[weakref.ref[Holder]] = []
        self.count = 0


class Saver:
    """What happens to a tensor that a node saves: kept, or (checkpointing) given to a frame."""

    __slots__ = ("frame", "inner", "position")

    def __init__(self, frame: Frame, inner: bool) -> None:
        self.frame, self.inner, self.position = frame, inner, 0

    def pack(self, storages: Sequence[Storage | None]) -> range:
        start = self.position
        for storage in storages:
            if self.inner:
                assert self.frame.recomputed is not None
                if self.frame.holders[self.position]() is not None:
                    self.frame.recomputed[self.position] = storage
            self.position += 1
            if self.inner and self.position == self.frame.count:
                raise StopRecomputation
        if not self.inner:
            self.frame.count = self.position
        return range(start, self.position)


def unpack(node: Node) -> list[Storage | None]:
    """What `node` saved; of a checkpointed call it is computed when first asked for."""
    out: list[Storage | None] = []
    for item in node.saved:
        if isinstance(item, Holder):
            frame = item.frame
            if frame.recomputed is None:
                frame.recompute(frame)
            assert frame.recomputed is not None
            out.append(frame.recomputed.pop(item.position))
        else:
            out.append(item)
    return out
