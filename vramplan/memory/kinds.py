"""Recording each kind of layer once, where a pattern of kinds would run some kinds many times.

Of the layers that record.layers_to_run names only these are run: of each kind the first one, the
last of all layers (which the head follows), and one more. Every other layer is one of these again.
That holds if what passes from a layer to the next is always the same: all that a rule could ask of
the hidden states on their way forward, of their gradients on the way back, and what else backward
carries along (ZeRO's bucket). Both are looked at between all layers that are run; where they
differ, all of the layers are run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from vramplan.memory.record import Mark, Recorder, Recording, record_on, section_name
from vramplan.models.architecture import Architecture

Sections = list[tuple[range, int]]


class Spared:
    """Which layers are run for which, and what was met between them."""

    def __init__(self) -> None:
        self.sections: Sections = []
        """What would be run."""
        self.same: dict[int, int] = {}
        """For each of its layers the one that is run."""
        self.names: dict[str, int] = {}
        """Sections that are run, by their names in the marks: their layers."""
        self.gates: dict[tuple[str, str], tuple[Any, ...]] = {}
        """By phase and name what a section was given."""

    def spare(self, sections: Sections, kinds: Sequence[str]) -> Sections:
        """The sections that are run for `sections`; each repeats for all that it stands for."""
        layers = [layer for section, _ in sections for layer in section]
        firsts = {kinds[layer]: layer for layer in reversed(layers)}
        chosen: dict[tuple[str, bool, bool], int] = {}
        for layer in layers:
            kind = kinds[layer]
            key = (kind, layer == firsts[kind], layer == layers[-1])
            self.same[layer] = chosen.setdefault(key, layer)
        if len(chosen) == len(layers):
            return sections
        times: Counter[int] = Counter()
        for section, repeats in sections:
            for layer in section:
                times[self.same[layer]] += repeats
        run = [(range(layer, layer + 1), n) for layer, n in sorted(times.items())]
        self.sections, self.names = sections, {section_name(*one): one[0][0] for one in run}
        return run

    def met(self, phase: str, name: str, given: tuple[Any, ...]) -> None:
        """A section of `phase` begins, and is given what `given` says."""
        self.gates[phase, name] = given

    @property
    def holds(self) -> bool:
        """Whether the same passes between all layers that were run."""
        names = list(self.names)
        forward = {self.gates.get(("forward", name)) for name in names[1:]}
        backward = {self.gates.get(("backward", name)) for name in names[:-1]}
        return len(forward) == len(backward) == 1 and None not in forward | backward

    def unrolled(self, run: Recording) -> Recording:
        """`run` with the sections that would have been run, of the events of those that were."""
        marks: list[Mark] = []
        events: list[int] = []
        pieces: dict[int, list[int]] = {}  # of one phase
        for mark, following in pairwise(run.marks):
            piece = run.events[mark.start : following.start]
            layer = self.names.get(mark.name)
            if layer is None:
                marks.append(mark._replace(start=len(events)))
                events += piece
                continue
            pieces[layer] = piece
            if len(pieces) == len(self.names):
                self._append(mark.phase, pieces, marks, events)
                pieces = {}
        marks.append(run.marks[-1]._replace(start=len(events)))
        return run._replace(marks=tuple(marks), events=events)

    def _append(
        self, phase: str, pieces: dict[int, list[int]], marks: list[Mark], events: list[int]
    ) -> None:
        step = 1 if phase == "forward" else -1
        for layers, repeats in self.sections[::step]:
            marks.append(Mark(phase, section_name(layers, repeats), len(events), repeats))
            for layer in layers[::step]:
                events += pieces[self.same[layer]]


def record_kinds(make: Callable[[], Recorder], arch: Architecture) -> Recording:
    """What record_on records with a recorder that `make` makes. A storage of a layer that stands
    for others is born, and freed, in each of their sections; its copies are those of all."""
    recorder = make()
    spared = recorder.spared = Spared()
    recording = record_on(recorder, arch)
    if not spared.names:
        return recording
    if not spared.holds:
        return record_on(make(), arch)
    return spared.unrolled(recording)
