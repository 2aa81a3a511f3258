"""Estimate beside trace, by phase and category, and the first section in which they part."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vramplan.hardware.catalogue import Gpus
from vramplan.memory.estimate import Estimate, estimate
from vramplan.memory.program import CUDA_BLOCK, Point, reckoned
from vramplan.recipe.recipe import Recipe
from vramplan.reports.comparison import Comparison, Parting, Side
from vramplan.units import KIB, format_bytes
from vramplan_launcher.trace import api

if TYPE_CHECKING:
    from vramplan_launcher.trace.counting import Storage
    from vramplan_launcher.trace.scaling import Deep
    from vramplan_launcher.trace.steps import Trace

TOLERANCE = 256 * KIB
"""Scalars and tables of positions, which a description leaves out, come to less."""
SHARE = 5000
"""... or a part in so many of the peak."""
WINDOW = {"forward": 0, "backward": 8}
"""Allocations and releases by which the two sides may set a section's bounds apart."""
SHOWN = 4
LAYER = re.compile(r"^(?:.*?\.)?\w+\.(\d+)(?:\.|$)")
"""The first number in a module's path is its layer's."""


def compared(
    model: Any,
    recipe: Recipe = Recipe(),  # noqa: B008
    gpu: Gpus | None = None,
    *,
    offline: bool | None = None,
) -> Comparison:
    """Estimate `model` and trace it, and find where the two part.

    Raises UserError as `estimate` and `trace_model` do.
    """
    from vramplan.models.locate import locate

    located = locate(model, offline=offline)
    needed = estimate(located.config, recipe, gpu)  # first: what it refuses costs no trace
    deep = api.run(located.config, recipe, api.capability_of(gpu))
    traced = api.traced(deep, located.id, recipe, gpu)
    tolerance = max(TOLERANCE, traced.peak_allocated // SHARE)
    return Comparison(
        id=located.id,
        recipe=recipe.to_dict(),
        estimate=_side(needed),
        trace=_side(traced),
        parting=first_parting(deep, located.config, recipe, gpu, tolerance),
        tolerance=tolerance,
    )


def _side(e: Any) -> Side:
    return Side(
        peak_allocated=e.peak_allocated,
        peak_phase=e.peak_phase,
        phases={name: (p.end, p.peak) for name, p in e.timeline.phases().items()},
        breakdown=dict(e.breakdown),
    )


# --- sections -------------------------------------------------------------------------------


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


def first_parting(
    deep: Deep, config: Mapping[str, Any], recipe: Recipe, gpu: Gpus | None, tolerance: int
) -> Parting | None:
    """The first section of a steady step where the two differ by more than `tolerance`.

    Of a deep model the traced, shallower one is compared with an estimate of the same depth.
    """
    from vramplan_launcher.trace.build import cut_depth

    run = deep.large
    shallow = dict(config) if run.layers is None else cut_depth(dict(config), run.layers)
    needed = estimate(shallow, recipe, gpu)
    for phase in ("forward", "backward"):
        groups = _estimated(needed, phase)
        traced = _traced(run, phase, [layers for layers, _ in groups])
        for (_, mine), theirs in zip(groups, traced, strict=True):
            what = _difference(mine, theirs, tolerance)
            if what:
                return _named(needed, phase, mine, theirs, what)
    return None


def _difference(mine: Stretch, theirs: Seen, tolerance: int) -> str:
    """In what they differ; "" where they don't."""
    if all(abs(mine.end - level) > tolerance for level in theirs.ends):
        return "what it keeps"
    if not min(theirs.peaks) - tolerance <= mine.peak <= max(theirs.peaks) + tolerance:
        return "its highest instant"
    return ""


Layers = tuple[int, int] | None
"""First and last layer of a stretch in the order of the phase; None: before or after them all."""


def _estimated(needed: Estimate, phase: str) -> list[tuple[Layers, Stretch]]:
    """The sections of a phase, what comes before the layers and what comes after them as one each.

    What comes after them in backward (the embedding) is with the last of them: a trace can't tell.
    """
    recipe, program = needed.recipe, needed.parts.program
    sizes = program.sizes(powers(recipe.batch_size, recipe.seq_len))
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


def powers(batch: int, seq: int) -> tuple[int, ...]:
    """Of MONOMIALS."""
    from vramplan.memory.program import MONOMIALS

    return tuple(batch**i * seq**j for i, j in MONOMIALS)


# --- the trace's side -----------------------------------------------------------------------


def _traced(run: Trace, phase: str, groups: Sequence[Layers]) -> Iterator[Seen]:
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
            seen.highest = Tally(s.size for s in made.values())
    seen.kept = Tally(s.size for s in made.values())


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


# --- names ----------------------------------------------------------------------------------


def _named(
    needed: Estimate,
    phase: str,
    mine: Stretch,
    theirs: Seen,
    what: str,
) -> Parting:
    keeps = what == "what it keeps"
    sizes = (mine.kept, theirs.kept) if keeps else (mine.highest, theirs.highest)
    ends = (mine.end, theirs.end) if keeps else (mine.peak, theirs.peak)
    rules = _rules(needed, phase, mine.name.startswith("layer"))
    ops: dict[int, dict[str, None]] = {}
    for storage in theirs.storages:
        ops.setdefault(storage.size, {})[f"{storage.op} {_place(storage)}".strip()] = None
    return Parting(
        phase=phase,
        section=mine.name,
        what=what,
        estimate=ends[0] - mine.start,
        trace=ends[1] - theirs.start,
        only_in_estimate=_listed(sizes[0] - sizes[1], {s: list(r) for s, r in rules.items()}),
        only_in_trace=_listed(sizes[1] - sizes[0], {s: list(o) for s, o in ops.items()}),
    )


def _place(storage: Storage) -> str:
    return f"in {storage.module} {list(storage.shape)} {storage.dtype}" if storage.module else ""


def _listed(only: Tally[int], makers: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """The largest storages without a counterpart, and what may have made them."""
    out = []
    for size, count in sorted(only.items(), key=lambda item: -item[0] * item[1])[:SHOWN]:
        times = f"{count} x " if count > 1 else ""
        names = makers.get(size, ())
        more = f" (or {len(names) - 2} more)" if len(names) > 2 else ""
        out.append(f"{times}{format_bytes(size)}: {' or '.join(names[:2])}{more}".rstrip(": "))
    return tuple(out)


def _rules(needed: Estimate, phase: str, layers: bool) -> dict[int, dict[str, None]]:
    """By size, the description's methods and rules that allocate it in a phase."""
    from vramplan.memory.labels import labelled_step

    labelled = labelled_step(needed.architecture, needed.policy)
    recipe = needed.recipe
    scale = powers(recipe.batch_size, recipe.seq_len)
    out: dict[int, dict[str, None]] = {}
    for mark, events in labelled.sections():
        if mark.phase != phase or mark.name.startswith("layer") != layers:
            continue
        for event in events:
            if event < 0:
                continue
            label = labelled.labels[event]
            nbytes = _bytes(labelled.recording.sizes[event], scale)
            size = -(-nbytes // CUDA_BLOCK) * CUDA_BLOCK
            name = f"{label.inner or label.rule} {label.when} in {label.place}".strip()
            out.setdefault(size, {})[name.removesuffix(" in")] = None
    return out


def _bytes(size: tuple[int, int, int], scale: Sequence[int]) -> int:
    from vramplan.memory.program import POSITION

    n, i, j = size
    return n * scale[POSITION[i, j]] if j >= 0 else reckoned(n, i, j, scale)
