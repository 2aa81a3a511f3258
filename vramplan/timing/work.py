"""What a step's kernels do, counted while its description runs on the tape that memory is read off.

An op's default is a pointwise kernel: it reads its inputs (backward: the incoming gradients and
what was saved) and writes what it allocates; an op that allocates nothing is a view. Rules whose
kernels do more say so (`Tape.works`):

    "product"          rows, n_in, n_out, dtype, "forward" | "input" | "weight"
    "batched product"  sizes of both operands, size of the result, dtype
    "grouped product"  as a product, and the number of experts
    "folded product"   experts, n_out, n_in, rank, dtype (peft's adapters of experts)
    "attention"        "fused" | "efficient", "forward" | "backward", heads, head size of queries,
                       of values, dtype, whether causal without a mask
    "dequantize"       elements, dtype of the result; "dequantize once": its scales are in fp32
    "int8"             rows, n_in, n_out, dtype, "forward" | "input", deviation of its outliers
    "scatter"          size: rows are added up where their sorted indices say
    "moves"            size, bytes: a kernel that reads and writes so many bytes an element
    "layer"            a layer begins: what its modules cost the host
    "one kernel"       all that is allocated comes from a single kernel, at a pace of so many
                       elements that go one by one (Traffic.elements)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from vramplan.memory.precision import Policy
from vramplan.memory.program import POSITION
from vramplan.memory.record import Mark, Recorder, record_on
from vramplan.memory.tape import Made
from vramplan.memory.values import ITEMSIZE, Node, Parameter, Size, Storage, Value
from vramplan.models.architecture import Architecture

REDUCED = 0.5  # a reduction's pace, in elements that go one by one (measured: 0.4 to 0.6)


class Traffic(NamedTuple):
    """Pointwise kernels that write tensors of one monomial in batch and sequence."""

    nbytes: float = 0
    """Read and written by kernels that run at the memory's pace."""
    elements: float = 0
    """Of kernels that compute an address for each: casts to a wider dtype, broadcasts, strides."""
    kernels: int = 0

    def plus(self, nbytes: float, elements: float, kernels: int) -> Traffic:
        return Traffic(self.nbytes + nbytes, self.elements + elements, self.kernels + kernels)


class Kernel(NamedTuple):
    """A kernel whose time is more than its bytes: its kind and figures, as the rule said them."""

    kind: str
    figures: tuple[Any, ...]


class Stretch(NamedTuple):
    """The work of one repetition of a section of the step."""

    phase: str
    name: str
    repeats: int
    traffic: dict[tuple[str, int], Traffic]
    """Pointwise kernels, by part ("forward", "recompute", "backward") and the monomial of what they
    write."""
    kernels: Counter[tuple[str, Kernel]]
    """By part: kernels of other kinds, and how many."""
    host: Counter[str]
    """What the host's thread does: how often each of the kinds in HOST_WORK."""


HOST_WORK = (
    "op",  # an op's forward, with its node
    "view",  # an op's forward that launches nothing
    "node",  # a node of backward
    "kernel",  # a kernel beyond the first of an op
    "grad",  # a kernel of backward
    "linear",  # a linear's module
    "adapter",  # a LoRA branch
    "dequantize",  # bitsandbytes' 4-bit product, forward or backward
    "int8",  # bitsandbytes' int8 product, forward
    "int8 backward",
    "gradient",  # a parameter's AccumulateGrad
    "checkpoint",  # a layer's torch.utils.checkpoint
    "layer",  # a layer's modules and the library's own Python around them
    "forward",  # a micro-batch's forward, whatever the model
    "backward",  # its backward
    "hook",  # a saved tensor that checkpointing's hooks take, forward or in a recomputation
)


class Given(NamedTuple):
    """A tensor that a kernel reads."""

    size: Size
    dtype: str
    partial: bool
    """A view of a part of its storage."""
    strided: bool


class _Frame:
    """What an op's compute or backward has allocated and said, while it runs."""

    __slots__ = ("allocated", "one", "told")

    def __init__(self) -> None:
        self.allocated: list[tuple[Size, str]] = []
        self.told = 0  # kernels that the rule named
        self.one = 0.0


class WorkRecorder(Recorder):
    """Records as Recorder does, and adds up the work of each section."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.stretches: list[Stretch] = []
        self.frame: _Frame | None = None
        self.backwards = False

    # -- sections -----------------------------------------------------------------------------
    def mark(self, phase: str, name: str, repeats: int = 1, gathers: bool = False) -> None:
        super().mark(phase, name, repeats, gathers)
        self._open(self.marks[-1])

    def sections(self, kinds: Sequence[str]) -> list[tuple[range, int]]:
        """The first layer, then one of each kind for all of that kind: work has no order."""
        first = {kind: layer for layer, kind in reversed(list(enumerate(kinds))) if layer}
        counts = Counter(kinds[1:])
        others = sorted((layer, counts[kind]) for kind, layer in first.items())
        return [(range(1), 1), *((range(i, i + 1), times) for i, times in others)]

    def _mark_backward(self, forward: Mark) -> None:
        super()._mark_backward(forward)
        self._open(self.marks[-1])

    def _open(self, mark: Mark) -> None:
        repeats = mark.repeats
        self.stretches.append(Stretch(mark.phase, mark.name, repeats, {}, Counter(), Counter()))
        if len(self.stretches) == 1:
            self.does("forward")

    def backward(self, loss: Value) -> None:
        self.does("backward")
        self.backwards = True
        super().backward(loss)

    @property
    def part(self) -> str:
        """Which part of the step a kernel of now belongs to."""
        if not self.backwards:
            return "forward"
        return "recompute" if self.recomputing else "backward"

    # -- counting -----------------------------------------------------------------------------
    def works(self, kind: str, *figures: Any) -> None:
        if kind == "one kernel":
            assert self.frame is not None
            self.frame.one = figures[0]
            return
        if self.frame is not None:
            self.frame.told += 1
        if kind == "layer":
            self.does("layer")
            return
        if kind == "moves":
            self.move(*figures)
            return
        self.stretches[-1].kernels[self.part, Kernel(kind, figures)] += 1

    def move(self, size: Size, width: float, slow: float = 0.0, kernels: int = 1) -> None:
        """A pointwise kernel: `width` bytes an element of `size`, or slowly (a share of) each."""
        table, key = self.stretches[-1].traffic, (self.part, POSITION[size[1:]])
        nbytes = 0.0 if slow else size.numel * width
        table[key] = table.get(key, Traffic()).plus(nbytes, size.numel * slow, kernels)

    def does(self, what: str, times: int = 1) -> None:
        """The host's thread does something."""
        self.stretches[-1].host[what] += times

    def _close(self, frame: _Frame, given: Sequence[Given], backward: bool = False) -> int:
        """Count what an op did; the number of its kernels."""
        if frame.told:
            return frame.told
        if not frame.allocated:
            return 0
        largest = max(_rank(size) for size, _ in frame.allocated)
        big = [each for each in frame.allocated if 8 * _rank(each[0]) >= largest]
        most = max([largest, *(_rank(g.size) for g in given)])
        if 8 * largest < most and not backward:  # a reduction
            source = max(given, key=lambda g: _rank(g.size))
            self.move(source.size, 0, REDUCED)
            return 1
        width = ITEMSIZE[big[0][1]]
        if frame.one:
            self.move(big[0][0], 0, frame.one)
            return 1
        kernels = len(big)
        read = sum(ITEMSIZE[g.dtype] for g in given if 8 * _rank(g.size) >= most)
        awkward = _awkward(given, big, backward)
        for k, (size, dtype) in enumerate(big):
            if k < awkward:
                self.move(size, 0, 1.0)
            else:
                self.move(size, ITEMSIZE[dtype] + (read if not backward or k == 0 else 2 * width))
        return kernels

    # -- the tape's methods -------------------------------------------------------------------
    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        if self.frame is not None:
            self.frame.allocated.append((size, dtype))
        else:
            self.move(size, 2 * ITEMSIZE[dtype])
            self.does("kernel")
        return super().new(size, dtype, category)

    def record(
        self,
        inputs: Sequence[Value],
        saved: Callable[[], Sequence[Value | None]],
        compute: Callable[[], Made],
        backward: Callable[..., Any],
        context: Callable[[], Any] | None = None,
    ) -> Made:
        given = [self._given(v) for v in inputs]

        def counted() -> Made:
            outer, self.frame = self.frame, _Frame()
            out = compute()
            kernels = self._close(self.frame, given)
            self.frame = outer
            self.does("op" if kernels else "view")
            if kernels > 1:
                self.does("kernel", kernels - 1)
            return out

        def counted_backward(*grads: Value | None) -> Any:
            outer, self.frame = self.frame, _Frame()
            incoming = [self._given(g) for g in grads if g is not None]
            out = backward(*grads)
            kernels = self._close(self.frame, [*incoming, *given], backward=True)
            self.frame = outer
            self.does("node")
            if kernels:
                self.does("grad", kernels)
            return out

        return super().record(inputs, saved, counted, counted_backward, context)

    def pack(self, storages: Sequence[Storage | None]) -> Sequence[Any]:
        if self.saver is not None:
            self.does("hook", len(storages))
        return super().pack(storages)

    def _given(self, value: Value) -> Given:
        """What a kernel is told of a tensor."""
        partial = False
        if value.storage is not None:
            n, _, j = self.sizes[value.storage.index]
            partial = n != value.size.numel * ITEMSIZE[value.dtype] and j >= 0
        return Given(value.size, value.dtype, partial, value.strided)

    def _accumulate(self, old: Value, grad: Value) -> Value:
        outer, self.frame = self.frame, _Frame()
        out = super()._accumulate(old, grad)
        self.frame = outer
        self.move(old.size, 3 * ITEMSIZE[old.dtype], float(old.strided != grad.strided))
        self.does("grad")
        return out

    def sum_to(self, grad: Value, size: Size) -> Value:
        outer, self.frame = self.frame, _Frame()
        out = super().sum_to(grad, size)
        self.frame = outer
        self.move(grad.size, 0, REDUCED)
        self.does("grad")
        return out

    def leaf(self, parameter: Parameter) -> Value:
        value = super().leaf(parameter)
        node = parameter.node
        if node is not None and getattr(node.backward, "counts", None) is None:
            node.backward = self._counted_leaf(parameter, node)
        return value

    def _counted_leaf(self, parameter: Parameter, node: Node) -> Callable[..., Any]:
        """AccumulateGrad: adds in place where a gradient is there already."""
        inner = node.backward

        def backward(grad: Value) -> Any:
            self.does("gradient")
            if parameter.grad is not None:
                self.move(parameter.size, 3 * ITEMSIZE[parameter.dtype])
                self.does("grad")
            return inner(grad)

        backward.counts = True  # type: ignore[attr-defined]
        return backward

    # -- modules, for the host's thread ---------------------------------------------------------
    def checkpoint(self, function: Callable[..., Value], x: Value, *args: Any) -> Value:
        self.does("checkpoint")
        return super().checkpoint(function, x, *args)

    def linear(self, x: Value, name: str, n_in: int, n_out: int, *rest: Any, **named: Any) -> Value:
        self.does("linear")
        return super().linear(x, name, n_in, n_out, *rest, **named)

    def lora_branch(self, x: Value, name: str, n_in: int, n_out: int) -> Value:
        self.does("adapter")
        return super().lora_branch(x, name, n_in, n_out)


def _awkward(given: Sequence[Given], made: Sequence[tuple[Size, str]], backward: bool) -> int:
    """How many of an op's kernels can't run at the memory's pace.

    TensorIterator vectorizes what is contiguous and of one dtype (and casts from fp32 to 16 bits);
    all else goes element by element (aten/src/ATen/native/cuda/CUDALoops.cuh, gpu_kernel_impl).
    """
    size, dtype = made[0]
    if backward:
        if not given:
            return 0
        grad, *rest = given
        widened = ITEMSIZE[dtype] > ITEMSIZE[grad.dtype]
        spread = 8 * _rank(grad.size) < _rank(size)
        if widened or spread or grad.partial:
            return len(made)
        return int(any(8 * _rank(g.size) < _rank(size) for g in rest) and len(rest) > 1)
    if any(g.partial for g in given):
        return len(made)
    mixed = any(g.dtype != dtype and (g.dtype != "fp32" or dtype == "fp32") for g in given)
    spread = any(8 * _rank(g.size) < _rank(size) for g in given)
    return len(made) if mixed or spread else 0


def _rank(size: Size) -> int:
    """For comparing sizes: any typical shape will do."""
    return size.numel << (2 * size.batch + 10 * size.seq)  # batch 4, sequence 1024


@lru_cache(maxsize=1024)
def count_work(arch: Architecture, policy: Policy) -> tuple[Stretch, ...]:
    """One micro-batch of `arch`, forward and backward, in the order in which it runs.

    Neighbours that do the same work (the first layer and those that repeat it) are one.
    """
    if not policy.double_quant:
        return tuple(map(_once, count_work(arch, replace(policy, double_quant=True))))
    g = WorkRecorder(policy)
    record_on(g, arch)
    out: list[Stretch] = []
    for s in g.stretches:
        if not (s.traffic or s.kernels or s.host):
            continue
        if out and out[-1].phase == s.phase and out[-1][3:] == s[3:]:
            out[-1] = out[-1]._replace(repeats=out[-1].repeats + s.repeats)
        else:
            out.append(s)
    return tuple(out)


def _once(stretch: Stretch) -> Stretch:
    """The same work on weights whose scales are not quantized."""
    kernels = Counter[tuple[str, Kernel]]()
    for (part, kernel), count in stretch.kernels.items():
        if kernel.kind == "dequantize":
            kernel = Kernel("dequantize once", kernel.figures)
        kernels[part, kernel] += count
    return stretch._replace(kernels=kernels)
