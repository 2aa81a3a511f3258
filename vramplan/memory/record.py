"""Recording a step: a family's description run forward and backward as Trainer runs the model.

Where layers repeat (one kind, or a pattern of kinds) only the first unit and one more are run; the
marks say how often each stands for itself. Of layers of one kind among these, kinds.py runs fewer.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.memory.experts import Experts
from vramplan.memory.precision import Policy
from vramplan.memory.tape import holders
from vramplan.memory.values import LEAF_ORDER, Node, Storage, Value
from vramplan.models.architecture import Architecture
from vramplan.models.blocks import family

if TYPE_CHECKING:
    from vramplan.memory.kinds import Spared


class Mark(NamedTuple):
    """Where a section begins in the events."""

    phase: str
    name: str
    start: int
    repeats: int = 1
    gathers: bool = False
    """Frees what the repetitions of earlier sections allocated, all at once."""


class Recording(NamedTuple):
    """`events`: storage i born as i, freed as ~i; `sizes` and `categories` by storage."""

    marks: tuple[Mark, ...]
    events: list[int]
    sizes: list[tuple[int, int, int]]
    categories: list[str]
    epilogues: int = 0
    """Threads that added a bias in a product (cuBLASLt): forward's, and autograd's recomputing."""
    copies: Mapping[int, int] = MappingProxyType({})
    """How many a storage stands for when contexts end: repeats of the layer that keeps it, which
    need not be the one that made it."""


class Recorder(Experts):
    """A graph that marks where the sections of forward and backward begin."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.marks: list[Mark] = []
        self.copies: dict[int, int] = {}
        self.bounds: list[tuple[int, Mark]] = []  # first node order of a forward section
        self.spared: Spared | None = None  # set where equal layers are to be run once (kinds.py)

    def mark(self, phase: str, name: str, repeats: int = 1, gathers: bool = False) -> None:
        mark = Mark(phase, name, len(self.events), repeats, gathers)
        self.marks.append(mark)
        if phase == "forward" and not gathers:
            self.bounds.append((self.order, mark))

    def sections(self, kinds: Sequence[str]) -> list[tuple[range, int]]:
        """The layers that are run, and how often each section happens."""
        sections = layers_to_run(kinds)
        return sections if self.spared is None else self.spared.spare(sections, kinds)

    def enters(self, x: Value) -> None:
        """A layer's forward section has begun: `x` is what it is given."""
        if self.spared is not None:
            self.spared.met("forward", self.marks[-1].name, (traits(x),))

    def state(self) -> tuple[int, ...]:
        """What else one layer's backward may leave for the next; of a plain tape nothing."""
        return ()

    def begin_backward(self) -> None:
        self._mark_backward(self.bounds[-1][1])

    def passed(self, node: Node) -> None:
        """A node made in an earlier section than the current one begins that section's backward."""
        while node.order != LEAF_ORDER and node.order <= self.bounds[-1][0]:
            self.bounds.pop()
            self._mark_backward(self.bounds[-1][1])
            if self.spared is not None:
                given = (*map(traits, node.buffers), self.state())
                self.spared.met("backward", self.marks[-1].name, given)

    def keeps(self, context: list[Storage | None]) -> None:
        """What a layer keeps on contexts, each of its repetitions keeps."""
        for storage in context:
            if storage is not None:
                self.copies[storage.index] = self.marks[-1].repeats

    def graph_ends(self) -> None:
        """The loss lets go of its graph: of all layers' contexts at once."""
        self.mark("backward", "end of the graph", gathers=True)

    def recording(self) -> Recording:
        """What was recorded up to now."""
        self.mark("end", "end")
        events = self.events[: self.marks[-1].start]
        return Recording(
            tuple(self.marks),
            events,
            self.sizes,
            self.categories,
            len(self.epilogues),
            self.copies,
        )

    def _mark_backward(self, forward: Mark) -> None:
        self.marks.append(forward._replace(phase="backward", start=len(self.events)))


def traits(value: Value | None) -> tuple[Any, ...]:
    """All of a tensor that rules ask for, and how many hold it."""
    if value is None:
        return ()
    storage = None
    if value.storage is not None:
        storage = (value.tape.sizes[value.storage.index], holders(value))
    flags = (value.requires_grad, value.view, value.strided, value.tail)
    return value.size, value.dtype, storage, flags, value.parameter is None


def record_step(arch: Architecture, policy: Policy) -> Recording:
    """Record one micro-batch, from the inputs to the end of backward."""
    return record_on(Recorder(policy), arch)


def record_on(g: Recorder, arch: Architecture) -> Recording:
    """What record_step does, with a recorder that may note more."""
    with uncollected():
        model = family(arch.family)(arch, g)
        g.mark("forward", "inputs")
        loss = _compute_loss(g, model)
        g.category = "temporary"
        g.begin_backward()
        g.backward(loss)
        return g.recording()


@contextmanager
def uncollected() -> Iterator[None]:
    """A tape's thousands of nodes die by their counts: looking for cycles among them is in vain,
    and takes up to a third of the time."""
    were_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if were_on:
            gc.enable()


def _compute_loss(g: Recorder, model: Any) -> Value:
    """Trainer.compute_loss: the model under autocast, its outputs then converted to fp32.

    accelerate's convert_outputs_to_fp32 copies what is 16-bit; the copy lives until the loss is
    taken from the outputs.
    """
    loss, logits = _forward(g, model)
    g.mark("forward", "autocast exit", gathers=True)
    g.clear_autocast_cache()
    if g.policy.autocast:
        logits = g.float(logits)
    if g.policy.copies_outputs:  # DDP's forward holds them until it returns their clones
        copy = g.new(logits.size, logits.dtype)
        del copy
    return loss


def _forward(g: Recorder, model: Any) -> tuple[Value, Value]:
    hidden = hidden_states(g, model)
    logits = model.head(hidden)
    return g.loss(logits, model.arch.vocab_size), logits


def hidden_states(g: Recorder, model: Any) -> Value:
    """The layers' forward and the final norm: what the head is given."""
    x: Value = model.embed()
    positions = model.positions() if g.policy.checkpointing else None
    tables = model.prepare(x)

    def run(x: Value, layer: int, tables: Any, positions: Any) -> Value:
        return model.run(x, layer, tables)  # type: ignore[no-any-return]

    for layers, repeats in g.sections([model.stage(i) for i in range(model.arch.layers)]):
        g.mark("forward", section_name(layers, repeats), repeats)
        g.enters(x)
        for layer in layers:
            given = model.tables_for(layer, tables)
            if g.policy.checkpointing:
                x = g.checkpoint(run, x, layer, given, positions)
            else:
                x = model.run(x, layer, given)
    g.mark("forward", "head")
    x = model.final_norm(x)
    model.held = ()
    return x


def section_name(layers: range, repeats: int) -> str:
    count = len(layers) * repeats
    return f"layer {layers[0]}" if count == 1 else f"layers {layers[0]}-{layers[0] + count - 1}"


def layers_to_run(kinds: Sequence[str]) -> list[tuple[range, int]]:
    """(layers, repeats): sections of consecutive layers, and how often each happens in a row.

    Of a stretch with a repeating pattern of kinds (of one, where all are equal) its first unit is
    run layer by layer, then one unit that stands for all further whole ones, then the rest. The
    first unit apart: what the layers of a kind share (a mask held for recomputation, say) is freed
    in the backward of the first of them, once. The last unit not: what follows it takes and gives
    what a unit would. Tests hold every family to a run of all its layers.
    """
    out: list[tuple[range, int]] = []
    start = 0
    while start < len(kinds):
        period, repeats = _pattern(kinds, start)
        alone = period if repeats else 1
        out += [(range(i, i + 1), 1) for i in range(start, start + alone)]
        start += alone
        if repeats:
            out.append((range(start, start + period), repeats))
            start += repeats * period
    return out


def _pattern(kinds: Sequence[str], start: int) -> tuple[int, int]:
    """(period, repeats) of the unit after the first that spares most layers; repeats 0: none."""
    best, spared = (1, 0), 0
    for period in range(1, (len(kinds) - start) // 2 + 1):
        if len(kinds) - start - 2 * period <= spared:
            break  # a longer unit cannot spare more
        stop = start + period
        while stop < len(kinds) and kinds[stop] == kinds[stop - period]:
            stop += 1
        repeats = (stop - start - period) // period
        if (repeats - 1) * period > spared:
            best, spared = (period, repeats), (repeats - 1) * period
    return best
