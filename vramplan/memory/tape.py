"""A tape: what a training step allocates and frees, in the order in which PyTorch does it.

Every birth and death of a storage (values.py) is appended to `Tape.events`; evaluating the tape for
a batch and a sequence is then arithmetic on integers.

Sources: torch/csrc/autograd/engine.cpp (order of nodes, release of saved variables),
input_buffer.cpp (accumulation), functions/accumulate_grad.h (stealing of gradients); torch
2.11-2.13.
"""

from __future__ import annotations

import heapq
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vramplan.memory.checkpoint import Frame, Holder, Saver, StopRecomputation, unpack
from vramplan.memory.reduction import REDUCTION
from vramplan.memory.values import ITEMSIZE, LEAF_ORDER, Node, Parameter, Size, Storage, Value

Made = TypeVar("Made", bound="Value | tuple[Value, ...]")


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
        self.contexts: list[Any] = []  # attributes of nodes that ran; the loss holds their graph
        self.epilogues: set[bool] = set()  # threads that ran addmm: forward's, a recomputation's

    @property
    def recomputing(self) -> bool:
        """Whether a checkpointed block is being run again for backward."""
        return self.saver is not None and self.saver.inner

    # -- storages -----------------------------------------------------------------------------
    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        """A fresh tensor."""
        numel, batch, seq = size
        nbytes = (numel * ITEMSIZE[dtype], batch, seq)
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
        compute: Callable[[], Made],
        backward: Callable[..., Any],
        context: Callable[[], Any] | None = None,
    ) -> Made:
        """Run an op: pack what it saves of its inputs, compute its output(s), attach its node.

        C++ nodes save their inputs before the kernel runs, so a checkpointed recomputation that
        stops early at the last saved tensor never runs that last kernel. `saved` may return None
        for inputs that live outside the tape. Outputs that are saved are packed by `save_output`.
        """
        if not self.grad_enabled:
            return compute()
        edges = [(v.node, v.slot) if v.node is not None else None for v in inputs]
        if not any(edges):
            return compute()
        kept = self.pack([v.storage if v is not None else None for v in saved()])
        out = compute()
        self.order += 1
        node = Node(self.order, edges, kept, backward)
        node.expected = [(v.size, v.dtype) for v in inputs]
        if context is not None:
            node.context = context()
            self.keeps(node.context)
        if isinstance(out, Value):
            out.node = node
            return out
        node.buffers *= len(out)
        for slot, value in enumerate(out):
            value.node, value.slot = node, slot
        return out

    def save_output(self, out: Value, *others: Value) -> None:
        """Let `out`'s node save `out` itself (softmax, rsqrt, ...) and by-products."""
        if out.node is not None:
            more = self.pack([v.storage for v in (out, *others)])
            out.node.saved = [*out.node.saved, *more]

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
            self.passed(node)
            edges = node.edges
            grads = self._run(node)
            del node
            for edge in edges:
                grad = grads.pop(0) if grads else None
                if edge is not None:
                    self._deliver(edge[0], edge[1], grad, queue)
                del grad
            del edges
        if self.contexts:
            self.graph_ends()
            self.contexts.clear()
        self.grad_enabled = True

    def works(self, kind: str, *figures: Any) -> None:
        """Called by rules whose kernels do more than read the inputs and write the outputs.

        A subclass may count it; see vramplan.timing.work for the kinds.
        """

    def keeps(self, context: list[Storage | None]) -> None:
        """Called with what a node keeps on its context; a subclass may note it."""

    def graph_ends(self) -> None:
        """Called before what nodes kept on their contexts is let go; a subclass may mark it."""

    def passed(self, node: Node) -> None:
        """Called before each backward node; a subclass may mark sections."""

    def _run(self, node: Node) -> list[Value | None]:
        """One node: its incoming gradients and saved tensors live until call_function returns.

        Before that validate_outputs sums what was broadcast and casts to the inputs' dtypes, one
        by one. What a checkpoint recomputed for it is its own no longer than its formula runs.
        """
        saved = unpack(node)
        buffers, node.buffers = node.buffers, []
        result = node.backward(*buffers)
        grads: list[Value | None] = list(result) if isinstance(result, tuple) else [result]
        del result, saved
        for i in range(len(grads)):
            grad = grads[i]
            if grad is not None:
                size, dtype = node.expected[i]
                if grad.size != size:
                    grads[i] = grad = self.sum_to(grad, size)
                if grad.dtype != dtype:
                    grads[i] = grad = self.new(size, dtype)
            del grad
        del buffers
        node.saved, node.edges = (), []
        if node.context is not None:
            self.contexts.append(node.context)
            node.context = None
        return grads

    def sum_to(self, grad: Value, size: Size) -> Value:
        """sum_to_size: over tokens it takes a buffer (reduction.py) while it runs."""
        out = self.new(size, grad.dtype)
        per_token, rest = divmod(grad.size.numel, size.numel)
        if grad.size[1:] == (1, 1) and size[1:] == (0, 0) and not rest:
            buffer = self.allocate((size.numel, per_token, REDUCTION), "temporary")
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
        if old.view or old.storage is None or holders(old) > ALONE:
            return self.new(old.size, old.dtype)
        return old


def holders(value: Value) -> int:
    """References to its storage: the value's own, and those that looking takes."""
    return sys.getrefcount(value.storage)


ALONE = holders(Tape().new(Size(1), "fp32"))
"""What `holders` says of a storage that one value holds. Versions of Python count differently."""


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


def accumulate_grad(tape: Tape, parameter: Parameter) -> Callable[..., Any]:
    """The gradient is stolen when the parameter has none, else added in place."""

    def backward(grad: Value) -> tuple[()]:
        parameter.node = None
        if parameter.grad is None and grad.storage is not None:
            tape.categories[grad.storage.index] = "gradient"
            parameter.grad = Value(tape, grad.storage, grad.size, grad.dtype)
        return ()

    return backward
