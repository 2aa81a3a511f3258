"""A step's phases under ZeRO: the tape, with what gathering and partitioning add by layer."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from vramplan.memory.program import Point, powers_of
from vramplan.memory.timeline import INPUT_TENSORS, TOKEN, Phase, Timeline
from vramplan.memory.zero_extras import Top, walk
from vramplan.memory.zero_part import Run, Sharded

CONTEXTS = "end of the graph"


def zero_timeline(
    part: Sharded, batch: int, seq: int, accumulation: int, workspace: int
) -> Timeline:
    """The phases of a steady step of `accumulation` micro-batches of batch x seq tokens."""
    inputs = INPUT_TENSORS * TOKEN * batch * seq * accumulation
    resident = part.resident + workspace + inputs
    points, _ = walk(part.last.program, part.last.extras, batch, seq)
    forward = _phase(points, "forward", resident + part.last.held)
    backward = _phase(points, "backward", resident + part.last.held)
    for run in part.others:
        other, _ = walk(run.program, run.extras, batch, seq)
        forward = _higher(forward, _phase(other, "forward", resident + run.held))
        backward = _higher(backward, _phase(other, "backward", resident + run.held))
    kept = part.contexts + contexts(
        part.last, batch, seq
    )  # the engine steps before the loss is let go
    end = resident + part.arriving + kept
    return Timeline(
        load=Phase(part.loaded, part.load_peak),
        prepare=Phase(part.initialized, max(part.initialized, part.initialized_peak)),
        forward=Phase(forward.end + part.gathered, forward.peak),
        backward=Phase(end, max(backward.peak, end)),
        optimizer_step=Phase(resident, resident + part.step + kept),
        resident=resident,
        held_gradients=part.last.held,
        points=tuple(points),
    )


def contexts(run: Run, batch: int, seq: int) -> int:
    """What nodes keep on their contexts until the loss is let go."""
    last = run.program.sections[-1]
    if last.name != CONTEXTS:
        return 0
    return -last.net.total(run.program.sizes(powers_of(batch, seq)))


def _phase(points: list[Point], name: str, base: int) -> Phase:
    mine = [p for p in points if p.section.phase == name]
    return Phase(base + mine[-1].end, base + max(p.peak for p in mine))


def _higher(one: Phase, other: Phase) -> Phase:
    return Phase(one.end, max(one.peak, other.peak))


class Highest(NamedTuple):
    """The highest section of a phase, of the micro-batch in which it is highest."""

    run: Run
    section: int
    top: Top


def highest(part: Sharded, phase: str, batch: int, seq: int) -> Highest:
    found: list[tuple[int, Highest]] = []
    for run in (part.last, *part.others):
        points, tops = walk(run.program, run.extras, batch, seq)
        for i, (point, top) in enumerate(zip(points, tops, strict=True)):
            if point.section.phase == phase:
                found.append((run.held + point.peak, Highest(run, i, top)))
    return max(found, key=lambda pair: pair[0])[1]


def zero_breakdown(
    part: Sharded, timeline: Timeline, workspace: int, batch: int, seq: int, stage: int
) -> dict[str, int]:
    """Bytes by category at the peak; what they lack of it is the caller's."""
    out: Counter[str] = Counter()
    phase = timeline.peak_phase
    if phase == "load":
        out["parameter"] = part.loaded
        return dict(out)
    out["parameter"] = part.weights
    out["optimizer"] = part.masters + (part.states if phase != "prepare" else 0)
    out["buffer"], out["gradient"] = part.buffers, part.gradients
    if phase == "prepare":
        return dict(out) if sum(out.values()) <= timeline.peak else {"parameter": timeline.peak}
    out["workspace"] = workspace
    if phase == "optimizer_step":
        out["gradient"] += part.arriving
        return dict(out)
    if timeline.backward.peak == timeline.backward.end and phase == "backward":
        out["gradient"] += part.arriving
        return dict(out)
    found = highest(part, phase, batch, seq)
    _at_peak(out, found, batch, seq)
    out["gradient" if stage < 3 else "parameter"] += found.top.added
    return dict(out)


def _at_peak(out: Counter[str], found: Highest, batch: int, seq: int) -> None:
    """What lives on the tape: sections before, repetitions before, and the instant."""
    program, top = found.run.program, found.top
    sizes = program.sizes(powers_of(batch, seq))
    section = program.sections[found.section]
    parts = [(before.net, before.repeats) for before in program.sections[: found.section]]
    parts.append((section.net, top.repetition + top.after))
    instant = section.highest(powers_of(batch, seq), sizes)
    if not top.after and instant is not None and instant.total(sizes) > 0:
        parts.append((instant, 1))
    for change, times in parts:
        for c, n in zip(change.classes, change.counts, strict=True):
            out[program.classes[c][3]] += times * n * sizes[c]
    out["gradient"] += found.run.held
