"""A step's phases under ZeRO: the tape, with what gathering and partitioning add by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vramplan.memory.program import Point, Program, Section, powers_of
from vramplan.memory.sharding import Sharded
from vramplan.memory.timeline import INPUT_TENSORS, TOKEN, Phase, Timeline


def zero_timeline(
    part: Sharded, batch: int, seq: int, accumulation: int, workspace: int
) -> Timeline:
    """The phases of a steady step of `accumulation` micro-batches of batch x seq tokens."""
    inputs = INPUT_TENSORS * TOKEN * batch * seq * accumulation
    resident = part.resident + workspace + inputs
    points = walk(part, part.program, batch, seq)
    forward = _phase(points, "forward", resident + part.held)
    backward = _phase(points, "backward", resident + part.held)
    if part.first is not None:
        alone = walk(part, part.first, batch, seq)
        again = part.held if part.arriving else 0  # stage 1 keeps what it owns, and finds no more
        forward = _higher(forward, _phase(alone, "forward", resident + again))
        backward = _higher(backward, _phase(alone, "backward", resident + again))
    backward = Phase(backward.end + part.arriving, max(backward.peak, backward.end + part.arriving))
    return Timeline(
        load=Phase(part.loaded, part.load_peak),
        prepare=Phase(part.initialized, max(part.initialized, part.initialized_peak)),
        forward=forward,
        backward=backward,
        optimizer_step=Phase(resident, resident + part.step),
        resident=resident,
        held_gradients=part.held,
        points=tuple(points),
    )


def walk(part: Sharded, program: Program, batch: int, seq: int) -> list[Point]:
    """Program.walk with the extra bytes of each layer; ends are the tape's and what is gathered."""
    sizes = program.sizes(powers_of(batch, seq))
    powers = powers_of(batch, seq)
    live, points = 0, []
    for section in program.sections:
        net = section.net.total(sizes)
        instant = section.highest(powers, sizes)
        high = instant.total(sizes) if instant else 0
        best, last, extra = -1, False, 0
        for k, inner in _repetitions(part, section):
            extra = max(extra_at(part, section.phase, layer) for layer in inner)
            reduced = net + max(_norms(part, section.phase, layer) for layer in inner)
            top = live + k * net + extra + max(high, reduced)
            if top > best:
                best, last = top, k > 0
        live += section.repeats * net
        points.append(Point(section, live + _stays(part, section, extra), best, instant, last))
    return points


def _norms(part: Sharded, phase: str, layer: int | None) -> int:
    """While the last gradients of a layer (None: of the head) that the rank owns go to the host."""
    if phase != "backward":
        return 0
    if layer is None:
        return part.norms[2]
    return part.norms[0 if layer < 0 else 1] if layer <= part.owned_until else 0


def extra_at(part: Sharded, phase: str, layer: int | None) -> int:
    """Bytes beyond the tape while a layer runs; None is the head, -1 what comes before layers."""
    extra = part.gathering.at(phase, layer) if part.gathering is not None else 0
    if phase != "backward" or layer is None:
        return extra
    if layer <= part.owned_until:
        extra += part.arriving
    if part.left_over:
        extra += part.left_over[layer + 1]
    return extra


def layers_of(section: Section) -> tuple[int, int] | None:
    """First and last layer of a section's repetitions; None: outside the layers."""
    kind, _, numbers = section.name.partition(" ")
    if kind not in ("layer", "layers"):
        return None
    first, _, last = numbers.partition("-")
    return int(first), int(last or first)


def _repetitions(part: Sharded, section: Section) -> Iterator[tuple[int, tuple[int | None, ...]]]:
    """The repetitions that can be the highest, in the order in which they run, with their layers.

    From one to the next the bytes change by the same amount, but where the rank's partition begins
    and where gathering reaches its limit: so those repetitions, the first and the last suffice.
    """
    found = layers_of(section)
    if found is None:
        yield 0, (-1 if section.name == "inputs" else None,)
        return
    first, last = found
    period, final = (last - first + 1) // section.repeats, section.repeats - 1
    bends = [part.owned_until]
    if part.gathering is not None:
        bends.append(part.gathering.full_from)
    places = {0, final}
    for bend in bends:
        places.update(range((bend - first) // period - 1, (bend - first) // period + 2))
    for place in sorted(k for k in places if 0 <= k <= final):
        k = place if section.phase == "forward" else final - place
        yield k, tuple(range(first + place * period, first + (place + 1) * period))


def _stays(part: Sharded, section: Section, extra: int) -> int:
    """What is gathered stays over forward's end; backward ends with all of it released."""
    return extra if section.phase == "forward" and part.gathering is not None else 0


def _phase(points: list[Point], name: str, base: int) -> Phase:
    mine = [p for p in points if p.section.phase == name]
    return Phase(base + mine[-1].end, base + max(p.peak for p in mine))


def _higher(one: Phase, other: Phase) -> Phase:
    return Phase(one.end, max(one.peak, other.peak))


def zero_breakdown(
    part: Sharded, timeline: Timeline, workspace: int, batch: int, seq: int
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
    out["gradient"] += timeline.held_gradients
    points = list(timeline.points)
    mine = [i for i, p in enumerate(points) if p.section.phase == phase]
    index = max(mine, key=lambda i: points[i].peak)
    for category, size in part.program.live_at(points, index, batch, seq).items():
        out[category] += size
    layer = _repeated_layer(part, points[index])
    if part.gathering is not None:
        out["parameter"] += part.gathering.at(phase, layer)
    if phase == "backward" and layer is not None:
        out["gradient"] += extra_at(part, phase, layer)
        if part.gathering is not None:
            out["gradient"] -= part.gathering.at(phase, layer)
    return dict(out)


def _repeated_layer(part: Sharded, point: Point) -> int | None:
    """The layer in which a section's peak falls, if in its first or last repetition."""
    runs = dict(_repetitions(part, point.section))
    return runs[max(runs) if point.last else 0][0]
