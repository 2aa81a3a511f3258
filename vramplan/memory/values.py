"""What the tape is made of: sizes, storages, parameters, tensors and autograd nodes.

A `Value` stands for a tensor: its storage, its size as a monomial in batch and sequence, its dtype
and the autograd node that made it. Storages live exactly as long as something holds them: a local
variable of the model's description (descriptions mirror the model's code, so their variables die
when the model's would), a node that saved them for backward, or the backward engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from vramplan.memory.ops import Elementwise
    from vramplan.memory.tape import Tape

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
LEAF_ORDER = 1 << 60  # AccumulateGrad runs as soon as it is ready (sequence_nr = UINT64_MAX)


class Size(NamedTuple):
    """Number of elements: `numel` x batch^`batch` x sequence^`seq`."""

    numel: int
    batch: int = 0
    seq: int = 0

    def times(self, factor: int) -> Size:
        return Size(self.numel * factor, self.batch, self.seq)

    def per(self, divisor: int) -> Size:
        whole, rest = divmod(self.numel, divisor)
        assert rest == 0, (self, divisor)
        return Size(whole, self.batch, self.seq)

    def at(self, batch: int, seq: int) -> int:
        return int(self.numel * batch**self.batch * seq**self.seq)

    def rank(self) -> int:
        """For comparing two sizes that broadcast against each other: any typical shape will do."""
        return self.at(61, 99_991)


class Storage:
    """One allocation. Its birth and death are written to the tape; CPython counts its holders."""

    __slots__ = ("__weakref__", "index", "tape")

    def __init__(self, tape: Tape, index: int) -> None:
        self.tape = tape
        self.index = index
        tape.events.append(index)

    def __del__(self) -> None:
        self.tape.events.append(~self.index)


class Parameter:
    """A weight. It lives outside the tape; only its gradient is born there."""

    __slots__ = ("cast", "dtype", "grad", "name", "node", "requires_grad", "size")

    def __init__(self, name: str, size: Size, dtype: str, requires_grad: bool) -> None:
        self.name, self.size, self.dtype, self.requires_grad = name, size, dtype, requires_grad
        self.grad: Value | None = None
        self.node: Node | None = None  # its AccumulateGrad
        self.cast: Value | None = None  # autocast's cached copy


class Value:
    """A tensor: `storage` is None for what lives outside the tape (weights and buffers)."""

    __slots__ = (
        *("dtype", "node", "parameter", "size", "slot", "storage", "strided", "tail", "tape"),
        "view",
    )
    tape: Elementwise

    def __init__(
        self,
        tape: Any,  # the Tape it lives on, which knows the ops' rules
        storage: Storage | None,
        size: Size,
        dtype: str,
        node: Node | None = None,
        slot: int = 0,
        view: bool = False,
    ) -> None:
        self.tape, self.storage, self.size, self.dtype = tape, storage, size, dtype
        self.node, self.slot, self.view = node, slot, view
        self.strided = False  # heads before tokens in shape, tokens before heads in memory
        self.tail = 0  # deviation of a gated product's factors (outliers.py), in millionths
        self.parameter: Parameter | None = None

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def alias(self, size: Size | None = None) -> Value:
        """A view that autograd passes through unchanged (view, transpose of a dense tensor)."""
        value = Value(self.tape, self.storage, size or self.size, self.dtype, self.node, self.slot)
        value.strided, value.parameter = self.strided, self.parameter
        return value

    # Descriptions read like the models' code: operators and methods call the tape's rules.
    def __add__(self, other: Value) -> Value:
        return self.tape.add(self, other)

    def __sub__(self, other: Value) -> Value:
        return self.tape.minus(self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.tape.mul(self, other)

    def __truediv__(self, other: float) -> Value:
        return self.tape.mul(self, other)

    def __neg__(self) -> Value:
        return self.tape.neg(self)

    def __getattr__(self, rule: str) -> Callable[..., Any]:
        if rule.startswith("__"):
            raise AttributeError(rule)
        function = getattr(self.tape, rule)
        return lambda *args, **kwargs: function(self, *args, **kwargs)


class Node:
    """One autograd node: its edges, what it saved, and its backward rule.

    `saved` holds storages kept alive for backward; `context` holds what a Python autograd function
    keeps on its `ctx` as plain attributes, which saved-tensor hooks (checkpointing) never see.
    """

    __slots__ = ("backward", "buffers", "context", "edges", "expected", "order", "saved", "waiting")

    def __init__(
        self,
        order: int,
        edges: list[tuple[Node, int] | None],
        saved: Sequence[Storage | None],
        backward: Callable[..., Any],
    ) -> None:
        self.order, self.edges, self.saved, self.backward = order, edges, saved, backward
        self.expected: list[tuple[Size, str]] = []  # size and dtype of the input behind each edge
        self.context: Any = None
        self.buffers: list[Value | None] = [None]  # a gradient for each output
        self.waiting = 0

    def __lt__(self, other: Node) -> bool:
        return self.order > other.order  # the engine's queue: later nodes first
