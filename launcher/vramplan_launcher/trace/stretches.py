"""The sections of a steady step on both sides: an estimate's, and a trace's of the same layers."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vramplan.memory.estimate import Estimate
from vramplan.memory.program import Point, powers_of

if TYPE_CHECKING:
    from vramplan_launcher.trace.counting import Storage
    from vramplan_launcher.trace.steps import Trace

WINDOW = {"forward": 0, "backward": 8}
"""Allocations and releases by which the two sides may set a section's bounds apart."""
LAYER = re.compile(r"^(?:.*?\.)?\w+\.(\d+)(?:\.|$)")
"""The first number in a module's path is its layer's."""


@dataclass(slots=True)
class Stretch:
    """A part of a phase on one side: bytes relative to the phase's start."""

    name: str
    start: int
    end: int = 0
    peak: int = 0
    kept: Tally[int] = field(default_factory=Tally)
    """Sizes of what it makes and keeps."""
    highest: Tally[int] = field(default_factory=Tally)
    """Sizes of what it has made and that lives at its highest instant."""


@dataclass(slots=True)
class Seen(Stretch):
    """The same of a trace, with what its bounds may be."""

    ends: list[int] = field(default_factory=list)
    """Levels around its end."""
    peaks: list[int] = field(default_factory=list)
    """Its highest level, with and without what is around its bounds."""
    storages: list[Storage] = field(default_factory=list)
    """All that it makes; of these, what it keeps and what lives at its highest instant."""
    staying: list[Storage] = field(default_factory=list)
    living: list[Storage] = field(default_factory=list)


Layers = tuple[int, int] | None
"""First and last layer of a stretch in the order of the phase; None: before or after them all."""


def estimated(needed: Estimate, phase: str) -> list[tuple[Layers, Stretch]]:
    """The sections of a phase, what comes before the layers and what comes after them as one each.

    What comes after them in backward (the embedding) is with the last of them: a trace can't tell.
    """
    recipe, program = needed.recipe, needed.parts.program
    sizes = program.sizes(powers_of(recipe.batch_size, recipe.seq_len))
    points = list(needed.timeline.points)
    mine = [p for p in points if p.section.phase == phase]
    before = points.index(mine[0])
    base = live = points[before - 1].end if before else 0
    out: list[tuple[Layers, Stretch]] = []
    for point in mine:
        name = point.section.name
        if name.startswith("layer"):
            first, last = _bounds(name)
            layers = (first, last) if phase == "forward" else (last, first)
            out.append((layers, _begun(_layers_name(layers), live - base)))
        elif not out or (out[-1][0] is not None and phase == "forward"):
            out.append((None, _begun(name, live - base)))
        _extend(out[-1][1], point, base, sizes)
        live = point.end
    return out


def _begun(name: str, level: int) -> Stretch:
    return Stretch(name, level, level, level)


def _extend(stretch: Stretch, point: Point, base: int, sizes: Sequence[int]) -> None:
    stretch.end = point.end - base
    high = point.peak - base
    if high >= stretch.peak:
        stretch.peak = high
        stretch.highest = Tally(stretch.kept)
        if point.instant is not None:
            stretch.highest += _tally(point.instant, sizes, 1)
        if point.last:
            stretch.highest += _tally(point.section.net, sizes, point.section.repeats - 1)
    stretch.kept += _tally(point.section.net, sizes, point.section.repeats)


def _tally(instant: Any, sizes: Sequence[int], times: int) -> Tally[int]:
    out: Tally[int] = Tally()
    for c, n in zip(instant.classes, instant.counts, strict=True):
        if n > 0:
            out[sizes[c]] += times * n
    return out


def _bounds(name: str) -> tuple[int, int]:
    """ "layer 3", or "layers 3-5" """
    first, _, last = name.partition(" ")[2].partition("-")
    return int(first), int(last or first)


def _layers_name(layers: tuple[int, int]) -> str:
    first, last = layers
    return f"layer {first}" if first == last else f"layers {first} to {last}"


# --- the trace's side -----------------------------------------------------------------------


def traced(run: Trace, phase: str, groups: Sequence[Layers]) -> Iterator[Seen]:
    """The same stretches of the trace."""
    measured = run.step(2)[phase]
    events = (run.counter.events or [])[measured.first_event : measured.last_event]
    levels = [measured.start, *(event.live for event in events)]
    levels = [level - measured.start for level in levels]  # levels[i]: before event i
    starts = _starts(events, groups)
    for start, stop in zip(starts, [*starts[1:], len(events)], strict=True):
        seen = Seen("", levels[start], levels[stop], max(levels[start : stop + 1]))
        window = WINDOW[phase]
        seen.peaks = [seen.peak, max(levels[max(0, start - window) : stop + 1 + window])]
        last = stop == len(events)
        seen.ends = [seen.end] if last else levels[max(0, stop - window) : stop + 1 + window]
        _collect(seen, events[start:stop], measured.start)
        yield seen


def _collect(seen: Seen, events: Sequence[Any], base: int) -> None:
    made: dict[int, Storage] = {}
    for event in events:
        if event.delta > 0:
            made[id(event.storage)] = event.storage
            seen.storages.append(event.storage)
        else:
            made.pop(id(event.storage), None)
        if event.live - base == seen.peak and event.delta > 0:
            seen.living = list(made.values())
    seen.staying = list(made.values())
    seen.highest = Tally(s.size for s in seen.living)
    seen.kept = Tally(s.size for s in seen.staying)


def _starts(events: Sequence[Any], groups: Sequence[Layers]) -> list[int]:
    """Where each group begins: with the first allocation in one of its layers.

    What follows the last layer begins, forward, with the first one outside of it.
    """
    places = [(i, layer_of(e.storage.module)) for i, e in enumerate(events) if e.delta > 0]
    starts: list[int] = []
    for number, layers in enumerate(groups):
        if layers is not None:
            wanted = {*range(min(layers), max(layers) + 1)}
            found = next((i for i, layer in places if layer in wanted), len(events))
        elif number == 0:
            found = 0
        else:
            last = max((i for i, layer in places if layer is not None), default=-1)
            found = next((i for i, _ in places if i > last), len(events))
        starts.append(max(found, starts[-1] if starts else 0))
    return starts


def layer_of(module: str) -> int | None:
    """The layer in which a module lies."""
    match = LAYER.match(module)
    return int(match[1]) if match else None
