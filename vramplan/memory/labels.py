"""A recording in which every storage knows where it was made: only for explaining, it is slower.

A label is read off Python's own stack: which method of the model's description, which rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import FunctionType
from typing import Any

from vramplan.memory.precision import Policy
from vramplan.memory.record import Mark, Recorder, Recording, record_on
from vramplan.memory.stepping_tape import SteppingRecorder, trained_of
from vramplan.memory.tape import Made, Tape
from vramplan.memory.values import ITEMSIZE, Node, Size, Storage, Value
from vramplan.models.architecture import Architecture
from vramplan.models.blocks import family

WRAPPERS = ("run", "block")  # a description's methods that say nothing about the place
HELPERS = ("unary", "constant")  # rules that others are written with


@dataclass(frozen=True, slots=True)
class Label:
    """Where a storage was made."""

    place: str = ""
    """Method of the description ("Llama.mlp"); "" outside of it."""
    rule: str = ""
    """The rule that the description calls ("linear")."""
    inner: str = ""
    """The rule that allocates ("dense"); often the same."""
    when: str = "forward"
    """forward | recomputed | backward | added (two gradients, out of place) | summed (a reduction's
    buffer) | stepped (by an optimizer within backward)"""
    source: str = ""
    """First line of the allocating rule's docstring."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A recording with, by storage, its label, bytes an element, and the rules that saved it."""

    recording: Recording
    labels: dict[int, Label]
    itemsizes: dict[int, int]
    savers: dict[int, tuple[str, ...]]

    def sections(self) -> list[tuple[Mark, list[int]]]:
        """Every section with its events."""
        marks, events = self.recording.marks, self.recording.events
        pairs = pairwise(marks)
        return [(mark, events[mark.start : following.start]) for mark, following in pairs]


class LabellingRecorder(Recorder):
    """Records as Recorder does, and labels every storage at its birth.

    It must not hold a value for longer than Recorder would: frames are read by their code alone,
    never by their local variables.
    """

    def __init__(self, policy: Policy, description: type[Any]) -> None:
        super().__init__(policy)
        self.family = description.__name__
        self.places = {id(f.__code__): name for name, f in _functions(description.__mro__)}
        self.rules = {id(f.__code__): f for _, f in _functions(_rule_classes())}
        self.labels: dict[int, Label] = {}
        self.itemsizes: dict[int, int] = {}
        self.savers: dict[int, dict[str, None]] = {}
        self.made: dict[int, Label] = {}  # by a node's order
        self.node = Label()

    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        self.labels[len(self.sizes)] = self.whence()
        self.itemsizes[len(self.sizes)] = ITEMSIZE[dtype]
        return super().new(size, dtype, category)

    def record(
        self,
        inputs: Sequence[Value],
        saved: Callable[[], Sequence[Value | None]],
        compute: Callable[[], Made],
        backward: Callable[..., Any],
        context: Callable[[], Any] | None = None,
    ) -> Made:
        before = self.order
        out = super().record(inputs, saved, compute, backward, context)
        if self.order > before:
            self.made[self.order] = self.whence()
            if context is not None:
                self._note_saved([context()])
        return out

    def pack(self, storages: Sequence[Storage | None]) -> Sequence[Any]:
        if self.saver is None or self.saver.inner:
            self._note_saved(storages)
        return super().pack(storages)

    def passed(self, node: Node) -> None:
        self.node = self.made.get(node.order, Label())
        super().passed(node)

    def whence(self) -> Label:
        """The label of what is being allocated now."""
        frame: Any = sys._getframe(2)
        rules: list[FunctionType] = []
        places: list[str] = []
        when = "forward"
        while frame is not None and id(frame.f_code) not in _ROOTS:
            code = id(frame.f_code)
            if code in self.rules:
                rules.append(self.rules[code])
            elif code in self.places:
                places.append(self.places[code])
            elif code == _ACCUMULATE:
                when = "added"
            elif code == _BACKWARD:
                if not places:
                    return replace(self.node, when="added" if when == "added" else "backward")
                when = "recomputed"
            frame = frame.f_back
        return self._label(rules, places, when)

    def _label(self, rules: list[FunctionType], places: list[str], when: str) -> Label:
        outside_in = [name for name in reversed(places) if name not in WRAPPERS]
        place = outside_in[0] if outside_in else "block" if places else ""
        if not rules:
            return Label(place=place and f"{self.family}.{place}", when=when)
        specific = [rule for rule in rules if rule.__name__ not in HELPERS] or rules
        return Label(
            place=place and f"{self.family}.{place}",
            rule=rules[-1].__name__,
            inner=specific[0].__name__,
            when=when,
            source=_source(specific),
        )

    def _note_saved(self, storages: Iterable[Any]) -> None:
        for storage in storages:
            if isinstance(storage, Storage):
                self.savers.setdefault(storage.index, {})[self.whence().rule] = None


class SteppingLabels(SteppingRecorder, LabellingRecorder):
    """The same, where the optimizer steps within backward."""

    def scratch(self, nbytes: int) -> Storage:
        self.labels[len(self.sizes)] = Label(
            place="optimizer", rule=self.policy.in_backward or "", when="stepped"
        )
        self.itemsizes[len(self.sizes)] = 1
        return super().scratch(nbytes)


def labelled_step(arch: Architecture, policy: Policy) -> Labelled:
    """What `record_step` records, with labels."""
    description = family(arch.family)
    g: LabellingRecorder
    if policy.in_backward is None:
        g = LabellingRecorder(policy, description)
    else:
        g = SteppingLabels(policy, description)
        g.prepare(trained_of(arch, policy))
    recorded = record_on(g, arch)
    for index in range(len(recorded.sizes)):  # a reduction's buffer is born without `new`
        g.labels.setdefault(index, Label(when="summed"))
        g.itemsizes.setdefault(index, 1)
    savers = {index: tuple(rules) for index, rules in g.savers.items()}
    return Labelled(recorded, g.labels, g.itemsizes, savers)


def _source(rules: list[FunctionType]) -> str:
    """The first line of the innermost docstring."""
    docstrings = (rule.__doc__ for rule in rules)
    return next((text.partition("\n")[0] for text in docstrings if text), "")


def _rule_classes() -> tuple[type, ...]:
    """What Recorder is made of, down to Tape, whose methods are no rules."""
    return Recorder.__mro__[1 : Recorder.__mro__.index(Tape)]


def _functions(classes: Iterable[type]) -> Iterable[tuple[str, FunctionType]]:
    for one in classes:
        for name, member in vars(one).items():
            function = getattr(member, "__func__", member)
            if isinstance(function, property):
                function = function.fget
            if isinstance(function, FunctionType) and not name.startswith("__"):
                yield name, function


_BACKWARD = id(Tape.backward.__code__)
_ACCUMULATE = id(Tape._accumulate.__code__)
_ROOTS = frozenset({id(labelled_step.__code__)})
