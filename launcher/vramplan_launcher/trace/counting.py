"""Counting storages: every one as it is born and freed, rounded as CUDA's caching allocator rounds.

A `Counter` is a dispatch mode above the fake tensor mode, so it sees an operation's outputs
but not what a meta function makes inside; what a CUDA kernel allocates inside is named in
`cuda_ops.KERNEL_SCRATCH`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vramplan_launcher.trace import engine
from vramplan_launcher.trace.blocks import Block, Blocks

aten = torch.ops.aten
BLOCK = 512
"""Bytes to which CUDACachingAllocator rounds (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp)."""


def rounded(nbytes: int) -> int:
    """Bytes that the allocator counts for a request of `nbytes`."""
    return (nbytes + BLOCK - 1) // BLOCK * BLOCK


@dataclass(slots=True)
class Storage:
    """One live storage: who made it, and how large it is."""

    size: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    category: str
    phase: str
    block: Block | None = None


@dataclass(slots=True)
class Event:
    """One allocation (positive `delta`) or release (negative)."""

    delta: int
    live: int
    storage: Storage


@dataclass(slots=True)
class Phase:
    """Live bytes at a phase's start and end and the most within."""

    name: str
    start: int
    end: int = 0
    peak: int = 0
    first_event: int = 0
    last_event: int = 0
    peak_storages: list[Storage] = field(default_factory=list)
    end_storages: list[Storage] = field(default_factory=list)


Scratch = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]


class Counter(TorchDispatchMode):
    """Counts live bytes; `watch_peak` keeps the list of storages at each phase's peak.

    `notice` maps an operation to what is called with its arguments before it runs.
    """

    def __init__(
        self,
        *,
        scratch: dict[Any, Scratch] | None = None,
        replaced: dict[Any, Callable[..., Any]] | None = None,
        answer: Callable[[torch.Tensor, str], Any] | None = None,
        keep_events: bool = False,
        watch_peak: bool = False,
        blocks: Blocks | None = None,
    ) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.storages: dict[int, Storage] = {}
        self.refs: dict[int, weakref.ref[Any]] = {}
        self.events: list[Event] | None = [] if keep_events else None
        self.watch_peak = watch_peak
        self.peak_storages: list[Storage] = []
        self.module = ""
        self.category = "activation"
        self.phase = "load"
        self.phases: list[Phase] = []
        self._scratch = scratch or {}
        self.replaced = replaced or {}
        self._answer = answer
        self.notice: dict[Any, Callable[..., None]] = {}
        engine.sole_holders()  # tried before there is a backward
        self.device = "cpu"
        self.autocast: torch.dtype | None = None  # around int8 products: no mode can see it
        self._elsewhere: set[int] = set()
        self._outside = 0
        self.blocks = blocks

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and self._answer is not None:
            made = self.storages.get(args[0].untyped_storage()._cdata)
            return self._answer(args[0], made.op if made else "")
        if func is aten.add.Tensor and engine.adds_in_place(args, kwargs):
            return args[0]
        notice = self.notice.get(func)
        if notice is not None:
            notice(*args, **kwargs)
        replaced = self.replaced.get(func)
        out = replaced(func, *args, **kwargs) if replaced else func(*args, **kwargs)
        self.take(out, func)
        scratch = self._scratch.get(func)
        if scratch is not None:
            need = scratch(func, args, kwargs, out)
            if need:
                self.pulse(need, f"{func} (scratch)")
        return out

    def take(self, out: Any, func: Any) -> None:
        """Counts what is new among the tensors of `out`."""
        if isinstance(out, torch.Tensor):
            self._add(out, func)
            return
        if isinstance(out, (tuple, list)):
            for item in tree_leaves(out):
                if isinstance(item, torch.Tensor):
                    self._add(item, func)

    def _add(self, tensor: torch.Tensor, func: Any) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages or key in self._elsewhere:
            return
        if self._outside:
            self._elsewhere.add(key)
            self.refs[key] = weakref.ref(storage, partial(self._gone_elsewhere, key))
            return
        nbytes = storage.nbytes()
        size = rounded(nbytes)
        node = torch._C._current_autograd_node()
        name = str(func)
        if node is not None:
            name = f"{node.name()} > {name}"
        record = Storage(
            size,
            name,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            self.module,
            self.category,
            self.phase,
        )
        self._place(record)
        self.storages[key] = record
        self.refs[key] = weakref.ref(storage, partial(self._free, key))
        self._count(record.size, record)

    def _place(self, record: Storage) -> None:
        """With the default allocator a storage counts as large as its block."""
        if self.blocks is not None:
            record.block = self.blocks.take(record.size)
            record.size = record.block.size

    def _gone_elsewhere(self, key: int, _: Any = None) -> None:
        self._elsewhere.discard(key)
        self.refs.pop(key, None)

    def _free(self, key: int, _: Any = None) -> None:
        record = self.storages.pop(key, None)
        self.refs.pop(key, None)
        if record is not None:
            if record.block is not None and self.blocks is not None:
                self.blocks.give_back(record.block)
            self._count(-record.size, record)

    def _count(self, delta: int, record: Storage) -> None:
        self.live += delta
        if self.events is not None:
            self.events.append(Event(delta, self.live, record))
        if self.live > self.peak:
            self.peak = self.live
            if self.watch_peak:
                self.peak_storages = list(self.storages.values())

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Storages made in here are not on the device (host or managed memory)."""
        self._outside += 1
        try:
            yield
        finally:
            self._outside -= 1

    def pulse(self, nbytes: int, op: str) -> None:
        """A storage that lives only inside one kernel."""
        size = rounded(nbytes)
        record = Storage(size, op, (nbytes,), "uint8", self.module, "temporary", self.phase)
        self._place(record)
        self.storages[-1] = record
        self._count(record.size, record)
        self._free(-1)

    def keep(self, nbytes: int, op: str, category: str) -> None:
        """A storage outside any tensor that stays to the end (a cuBLAS workspace)."""
        size = rounded(nbytes)
        record = Storage(size, op, (nbytes,), "uint8", "", category, self.phase)
        self._place(record)
        self.storages[-2 - len(self.storages)] = record
        self._count(record.size, record)

    def to_host(self, tensor: torch.Tensor) -> None:
        """A storage that was counted, and lives on the host in a run on a GPU."""
        key = tensor.untyped_storage()._cdata
        if key in self.storages:
            self._free(key)

    def to_device(self, tensor: torch.Tensor, op: str) -> None:
        """A storage that was made outside, and is on the device after all."""
        self._gone_elsewhere(tensor.untyped_storage()._cdata)
        self._add(tensor, op)

    def relabel(self, tensor: torch.Tensor, category: str, module: str) -> None:
        """Names a storage that is already counted."""
        record = self.storages.get(tensor.untyped_storage()._cdata)
        if record is not None:
            record.category, record.module = category, module

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[Phase]:
        """A phase: its start, end and peak are appended to `phases`."""
        phase = Phase(name, self.live, first_event=len(self.events or ()))
        self.phase, self.peak = name, self.live
        self.peak_storages = list(self.storages.values()) if self.watch_peak else []
        try:
            yield phase
        finally:
            phase.end, phase.peak = self.live, self.peak
            phase.last_event = len(self.events or ())
            phase.peak_storages = self.peak_storages
            if self.watch_peak:
                phase.end_storages = list(self.storages.values())
            self.phases.append(phase)
