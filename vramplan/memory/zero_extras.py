"""What ZeRO adds to a tape's sections: whole weights, a rank's gradients, by layer.

A section that stands for many layers changes by the same bytes from one to the next, so only those
layers can be the highest that lie on the upper hull of what is added: found once, when compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vramplan.memory.program import Point, Program, Section, powers_of

Adds = Callable[[str, "int | str"], int]
"""Bytes by phase and place: a layer's number, or a section's name ("inputs", "head", ...)."""


class Extra(NamedTuple):
    """For a section: (repetition, bytes) of those that can be the highest."""

    within: tuple[tuple[int, int], ...]
    """While it runs."""
    after: tuple[tuple[int, int], ...]
    """When it has run, on top of what the section changes."""


class Top(NamedTuple):
    """Where a section is highest: the repetition, what was added, and whether at its end."""

    repetition: int
    added: int
    after: bool


def extras_of(program: Program, within: Adds, after: Adds) -> tuple[Extra, ...]:
    """For each section of `program` what `within` and `after` say of its layers."""
    out = []
    for section in program.sections:
        runs = list(repetitions(section))
        hulls = [
            _hull([(k, max(adds(section.phase, place) for place in places)) for k, places in runs])
            for adds in (within, after)
        ]
        out.append(Extra(hulls[0], hulls[1]))
    return tuple(out)


def repetitions(section: Section) -> Iterator[tuple[int, tuple[int | str, ...]]]:
    """The repetitions in the order in which they run, with their layers."""
    kind, _, numbers = section.name.partition(" ")
    if kind not in ("layer", "layers"):
        yield 0, (section.name,)
        return
    start, _, end = numbers.partition("-")
    first, last = int(start), int(end or start)
    period, final = (last - first + 1) // section.repeats, section.repeats - 1
    for k in range(section.repeats):
        unit = k if section.phase == "forward" else final - k
        yield k, tuple(range(first + unit * period, first + (unit + 1) * period))


def _hull(points: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The upper convex hull: what can be the highest of k * slope + bytes, whatever the slope."""
    hull: list[tuple[int, int]] = []
    for k, size in points:
        while len(hull) > 1:
            (k0, s0), (k1, s1) = hull[-2:]
            if (s1 - s0) * (k - k0) > (size - s0) * (k1 - k0):
                break
            hull.pop()
        hull.append((k, size))
    return tuple(hull)


def walk(
    program: Program, extras: Sequence[Extra], batch: int, seq: int
) -> tuple[list[Point], list[Top]]:
    """Program.walk with what is added: a section's end is the tape's own."""
    powers = powers_of(batch, seq)
    sizes = program.sizes(powers)
    live, points, tops = 0, [], []
    for section, extra in zip(program.sections, extras, strict=True):
        net = section.net.total(sizes)
        instant = section.highest(powers, sizes)
        high = max(instant.total(sizes), 0) if instant else 0
        best, top = -1, Top(0, 0, False)
        for k, added in extra.within:
            if live + k * net + added + high > best:
                best, top = live + k * net + added + high, Top(k, added, False)
        for k, added in extra.after:
            if live + (k + 1) * net + added > best:
                best, top = live + (k + 1) * net + added, Top(k, added, True)
        live += section.repeats * net
        points.append(Point(section, live, best, instant, top.repetition > 0))
        tops.append(top)
    return points, tops
