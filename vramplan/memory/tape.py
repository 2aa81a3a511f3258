"""A tape: what a training step allocates and frees, in the order in which PyTorch does it.

A `Value` stands for a tensor: its storage, its size as a monomial in batch and sequence, its dtype
and the autograd node that made it. Storages live exactly as long as something holds them: a local
variable of the model's description (descriptions mirror the model's code, so their variables die
when the model's would), a node that saved them for backward, or the backward engine. Every birth
and death is appended to `Tape.events`; evaluating the tape for a batch and a sequence is then
arithmetic on integers.

Sources: torch/csrc/autograd/engine.cpp (order of nodes, release of saved variables),
input_buffer.cpp (accumulation), functions/accumulate_grad.h (stealing of gradients),
torch/utils/checkpoint.py (non-reentrant checkpointing with early stop); torch 2.11-2.13.
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vramplan.memory.reduction import REDUCTION

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
LEAF_ORDER = 1 << 60  # AccumulateGrad runs as soon as it is ready (sequence_nr = UINT64_MAX)


class Size(NamedTuple):
    """Number of elements: `count` x batch^`batch` x sequence^`seq`."""

    count: int
    batch: int = 0
    seq: int = 0

    def times(self, factor: int) -> Size:
        return Size(self.count * factor, self.batch, self.seq)

    def per(self, divisor: int) -> Size:
        whole, rest = divmod(self.count, divisor)
        assert rest == 0, (self, divisor)
        return Size(whole, self.batch, self.seq)

    def at(self, batch: int, seq: int) -> int:
        return int(self.count * batch**self.batch * seq**self.seq)

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

    def __init__(
        self,
        tape: Any,
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
        return self.tape.add(self, other)

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
        outputs: int = 1,
    ) -> None:
        self.order, self.edges, self.saved, self.backward = order, edges, saved, backward
        self.expected: list[tuple[Size, str]] = []  # size and dtype of the input behind each edge
        self.context: Any = None
        self.buffers: list[Value | None] = [None] * outputs
        self.waiting = 0

    def __lt__(self, other: Node) -> bool:
        return self.order > other.order  # the engine's queue: later nodes first


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


class Tape:
    """Records storages' births and deaths while a description runs forward and backward."""

    def __init__(self) -> None:
        self.events: list[int] = []
        # of each storage bytes x batch^i x seq^j; or a reduction's buffer (reduction.py)
        self.sizes: list[tuple[int, int, int]] = []
        self.categories: list[str] = []
        self.category = "activation"
        self.saver: Saver | None = None
        self.order = 0
        self.grad_enabled = True
        self.autocast: str | None = None
        self.casts: list[Parameter] = []
        self.epilogues: set[bool] = set()  # threads that ran addmm: forward's, a recomputation's

    @property
    def recomputing(self) -> bool:
        """Whether a checkpointed block is being run again for backward."""
        return self.saver is not None and self.saver.inner

    # -- storages -----------------------------------------------------------------------------
    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        """A fresh tensor."""
        nbytes = (size.count * ITEMSIZE[dtype], size.batch, size.seq)
        return Value(self, self.allocate(nbytes, category), size, dtype)

    def allocate(self, size: tuple[int, int, int], category: str | None = None) -> Storage:
        """A storage of bytes x batch^i x seq^j, or of a size that is reckoned when evaluated."""
        storage = Storage(self, len(self.sizes))
        self.sizes.append(size)
        self.categories.append(category or self.category)
        return storage

    def leaf(self, parameter: Parameter) -> Value:
        """A parameter as a value; all its uses share one AccumulateGrad."""
        value = Value(self, None, parameter.size, parameter.dtype)
        value.parameter = parameter
        if parameter.requires_grad and self.grad_enabled:
            if parameter.node is None:
                parameter.node = Node(LEAF_ORDER, [], (), accumulate_grad(self, parameter))
            value.node = parameter.node
        return value

    # -- autograd -----------------------------------------------------------------------------
    def record(
        self,
        inputs: Sequence[Value],
        saved: Callable[[], Sequence[Value | None]],
        compute: Callable[[], Any],
        backward: Callable[..., Any],
        context: Callable[[], Any] | None = None,
    ) -> Any:
        """Run an op: pack what it saves of its inputs, compute its output(s), attach its node.

        C++ nodes save their inputs before the kernel runs, so a checkpointed recomputation that
        stops early at the last saved tensor never runs that last kernel. `saved` may return None
        for inputs that live outside the tape. Outputs that are saved are packed by `save_output`.
        """
        if not self.grad_enabled or not any(v.node is not None for v in inputs):
            return compute()
        edges = [(v.node, v.slot) if v.node is not None else None for v in inputs]
        kept = self.pack([v.storage if v is not None else None for v in saved()])
        out = compute()
        self.order += 1
        values = out if isinstance(out, tuple) else (out,)
        node = Node(self.order, edges, kept, backward, len(values))
        node.expected = [(v.size, v.dtype) for v in inputs]
        if context is not None:
            node.context = context()
        for slot, value in enumerate(values):
            value.node, value.slot = node, slot
        return out

    def save_output(self, out: Value, *others: Value) -> None:
        """Let `out`'s node save `out` itself (softmax, rsqrt, ...) and by-products."""
        if out.node is not None:
            more = self.pack([v.storage for v in (out, *others)])
            out.node.saved = _join(out.node.saved, more)

    def pack(self, storages: Sequence[Storage | None]) -> Sequence[Any]:
        if self.saver is None:
            return storages
        frame, positions = self.saver.frame, self.saver.pack(storages)
        if self.saver.inner:
            return ()
        holders = [Holder(frame, position) for position in positions]
        frame.holders += [weakref.ref(holder) for holder in holders]
        return holders

    def checkpoint(self, function: Callable[..., Value], x: Value, *args: Any) -> Value:
        """torch.utils.checkpoint(use_reentrant=False): `function(x, *args)` saving only `x`."""
        cached = self.autocast

        def recompute(frame: Frame) -> None:
            saver, frame.recomputed = self.saver, {}
            enabled, autocast, category = self.grad_enabled, self.autocast, self.category
            self.saver, self.grad_enabled, self.autocast = Saver(frame, inner=True), True, cached
            self.category = "activation"
            try:
                function(x, *args)
            except StopRecomputation as stop:
                stop.__traceback__ = None  # the unwound frames let go of their variables
            self.clear_autocast_cache()
            self.saver, self.grad_enabled, self.autocast = saver, enabled, autocast
            self.category = category

        frame = Frame(recompute)
        outer, self.saver = self.saver, Saver(frame, inner=False)
        out = function(x, *args)
        self.saver = outer
        return out

    def clear_autocast_cache(self) -> None:
        """On leaving autocast the cached 16-bit copies of weights are dropped."""
        for parameter in self.casts:
            parameter.cast = None
        self.casts.clear()

    def backward(self, loss: Value) -> None:
        """Run the engine from `loss` (a scalar)."""
        root = loss.node
        assert root is not None
        self.grad_enabled = False
        _count_dependencies(root)
        root.buffers[loss.slot] = self.new(Size(1), loss.dtype, "temporary")
        del loss
        queue = [root]
        del root
        while queue:
            node = heapq.heappop(queue)
            self.passed(node.order)
            edges = node.edges
            grads = self._run(node)
            del node
            for edge in edges:
                grad = grads.pop(0) if grads else None
                if edge is not None:
                    self._deliver(edge[0], edge[1], grad, queue)
                del grad
            edges = ()
        self.grad_enabled = True

    def passed(self, order: int) -> None:
        """Called before each backward node; a subclass may mark sections."""

    def _run(self, node: Node) -> list[Value | None]:
        """One node: its incoming gradients and saved tensors live until call_function returns.

        Before that validate_outputs sums what was broadcast and casts to the inputs' dtypes, one
        by one. What a checkpoint recomputed for it is its own no longer than its formula runs.
        """
        saved = _unpack(node)
        buffers, node.buffers = node.buffers, []
        result = node.backward(*buffers)
        grads: list[Value | None] = list(result) if isinstance(result, tuple) else [result]
        del result, saved
        for i, (size, dtype) in enumerate(node.expected[: len(grads)]):
            grad = grads[i]
            if grad is not None and grad.size != size:
                grads[i] = grad = self.sum_to(grad, size)
            if grad is not None and grad.dtype != dtype:
                grads[i] = grad = self.new(size, dtype)
            del grad
        del buffers
        node.saved, node.context, node.edges = (), None, []
        return grads

    def sum_to(self, grad: Value, size: Size) -> Value:
        """sum_to_size: over tokens it takes a buffer (reduction.py) while it runs."""
        out = self.new(size, grad.dtype)
        per_token, rest = divmod(grad.size.count, size.count)
        if grad.size[1:] == (1, 1) and size[1:] == (0, 0) and not rest:
            buffer = self.allocate((size.count, per_token, REDUCTION), "temporary")
            del buffer
        return out

    def _deliver(self, node: Node, slot: int, grad: Value | None, queue: list[Node]) -> None:
        node.waiting -= 1
        if grad is not None:
            old = node.buffers[slot]
            node.buffers[slot] = None
            node.buffers[slot] = grad if old is None else self._accumulate(old, grad)
        if node.waiting == 0:
            heapq.heappush(queue, node)

    def _accumulate(self, old: Value, grad: Value) -> Value:
        """In place only when `old` is nobody else's and no view: a view holds its base as well."""
        if old.view or _shared(old.storage):
            return self.new(old.size, old.dtype)
        return old


def _join(saved: Any, more: Any) -> Any:
    return [*saved, *more]


def _shared(storage: Storage | None) -> bool:
    import sys

    # holders: the Value's slot, this argument, getrefcount's own argument
    return storage is None or sys.getrefcount(storage) > 3


def _count_dependencies(root: Node) -> None:
    seen, stack = {id(root)}, [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                node = edge[0]
                node.waiting += 1
                if id(node) not in seen:
                    seen.add(id(node))
                    stack.append(node)


def _unpack(node: Node) -> list[Storage | None]:
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


def accumulate_grad(tape: Tape, parameter: Parameter) -> Callable[..., Any]:
    """The gradient is stolen when the parameter has none, else added in place."""

    def backward(grad: Value) -> tuple[()]:
        parameter.node = None
        if parameter.grad is None and grad.storage is not None:
            tape.categories[grad.storage.index] = "gradient"
            parameter.grad = Value(tape, grad.storage, grad.size, grad.dtype)
        return ()

    return backward
