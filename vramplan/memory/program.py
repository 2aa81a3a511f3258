"""A training step as sections of births and deaths, compiled once, evaluated for any batch.

Compiling records a step (record.py) and reduces every section to its net change and to the
instants that can be its highest. Evaluating is arithmetic: a section that repeats r times shifts
what follows by r times its net change, and its highest instant is in its first or its last
repetition. Instants are polynomials in batch and sequence; the highest is then added up exactly,
with every storage rounded as the allocator rounds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import ge, mul

from vramplan.memory import outliers
from vramplan.memory.precision import Policy
from vramplan.memory.record import Mark, Recording, record_step
from vramplan.memory.reduction import REDUCTION, buffer_bytes
from vramplan.models.architecture import Architecture

CUDA_BLOCK = 512  # kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp

Key = tuple[int, int, int, str]  # bytes x batch^i x sequence^j (or REDUCTION), category
Top = tuple[tuple[int, ...], int, int]  # an instant: polynomial, position, reduction's buffer
MONOMIALS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2))  # exponents of batch and sequence
POSITION = {exponents: k for k, exponents in enumerate(MONOMIALS)}


@dataclass(frozen=True, slots=True)
class Instant:
    """Storages that live at an instant beyond those at its section's start, by size class."""

    polynomial: tuple[int, ...]
    """Bytes before rounding: coefficients of MONOMIALS."""
    classes: tuple[int, ...]
    counts: tuple[int, ...]
    buffer: int = -1
    """Class of the reduction's buffer among them, which the polynomial leaves out; -1: none."""

    def total(self, sizes: Sequence[int]) -> int:
        """Bytes, each storage rounded."""
        return sum(map(mul, self.counts, map(sizes.__getitem__, self.classes)))


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a phase (a layer, the head, ...) and how often it happens in a row."""

    phase: str
    name: str
    repeats: int
    net: Instant
    instants: tuple[Instant, ...]

    def highest(self, powers: Sequence[int], sizes: Sequence[int]) -> Instant | None:
        """The highest instant for a batch and a sequence; None: the section's start."""
        best, found = 0, None
        for instant in self.instants:
            value = sum(map(mul, instant.polynomial, powers))
            if instant.buffer >= 0:
                value += sizes[instant.buffer]
            if value > best:
                best, found = value, instant
        return found


@dataclass(frozen=True, slots=True)
class Point:
    """A section evaluated: live bytes at its end, and at its highest instant."""

    section: Section
    end: int
    peak: int
    instant: Instant | None
    """The highest instant; None: the section's start."""
    last: bool
    """Whether the peak falls in the last repetition."""


@dataclass(frozen=True, slots=True)
class Program:
    """One micro-batch, forward and backward."""

    sections: tuple[Section, ...]
    classes: tuple[Key, ...]
    epilogues: int = 0
    """Threads that keep a cuBLASLt workspace."""

    def sizes(self, powers: Sequence[int]) -> list[int]:
        """Bytes of each class as the allocator hands them out, in blocks of 512."""
        return [
            (
                (n * powers[POSITION[i, j]] if j >= 0 else reckoned(n, i, j, powers))
                + CUDA_BLOCK
                - 1
            )
            // CUDA_BLOCK
            * CUDA_BLOCK
            for n, i, j, _ in self.classes
        ]

    def walk(self, batch: int, seq: int) -> list[Point]:
        """The sections in order, with bytes relative to the start of the step."""
        powers = _powers(batch, seq)
        sizes = self.sizes(powers)
        live, points = 0, []
        for section in self.sections:
            net = section.net.total(sizes)
            instant = section.highest(powers, sizes)
            high = instant.total(sizes) if instant else 0
            shift = (section.repeats - 1) * net
            peak = live + max(0, shift) + high
            live += shift + net
            points.append(Point(section, live, peak, instant, shift > 0))
        return points

    def live_at(self, points: list[Point], index: int, batch: int, seq: int) -> dict[str, int]:
        """Bytes by category at the highest instant of section `index`."""
        sizes = self.sizes(_powers(batch, seq))
        out: Counter[str] = Counter()
        for point in points[:index]:
            self._add(out, sizes, point.section.net, point.section.repeats)
        point = points[index]
        if point.last:
            self._add(out, sizes, point.section.net, point.section.repeats - 1)
        if point.instant is not None:
            self._add(out, sizes, point.instant, 1)
        return dict(out)

    def _add(self, out: Counter[str], sizes: list[int], instant: Instant, times: int) -> None:
        for c, n in zip(instant.classes, instant.counts, strict=True):
            out[self.classes[c][3]] += times * n * sizes[c]


def reckoned(n: int, i: int, kind: int, powers: Sequence[int]) -> int:
    """Bytes of a storage whose size is no monomial: a reduction's buffer, outlier columns."""
    tokens = powers[POSITION[1, 1]]
    if kind == REDUCTION:
        return buffer_bytes(n, i * tokens)
    return outliers.nbytes(n, i, kind, tokens)


def _powers(batch: int, seq: int) -> tuple[int, ...]:
    return tuple(batch**i * seq**j for i, j in MONOMIALS)


@lru_cache(maxsize=1024)
def compile_step(arch: Architecture, policy: Policy) -> Program:
    """Record one micro-batch of `arch` under `policy` and reduce it."""
    return reduce_recording(record_step(arch, policy))


def reduce_recording(recording: Recording) -> Program:
    """Sections with their net changes and the instants that can be highest."""
    table: dict[Key, int] = {}
    classes = [
        table.setdefault((*size, category), len(table))
        for size, category in zip(recording.sizes, recording.categories, strict=True)
    ]
    keys = tuple(table)
    weight = _birth_repeats(recording)
    sections = []
    for mark, following in zip(recording.marks, recording.marks[1:], strict=False):
        events = recording.events[mark.start : following.start]
        sections.append(_reduce(mark, events, classes, keys, weight if mark.gathers else {}))
    return Program(tuple(sections), keys, recording.epilogues)


def _birth_repeats(recording: Recording) -> dict[int, int]:
    """For storages born in a repeated section: how many of them there are."""
    out = {}
    for mark, following in zip(recording.marks, recording.marks[1:], strict=False):
        if mark.repeats > 1:
            for event in recording.events[mark.start : following.start]:
                if event >= 0:
                    out[event] = mark.repeats
    return out


def _reduce(
    mark: Mark,
    events: Sequence[int],
    classes: Sequence[int],
    keys: Sequence[Key],
    weight: Mapping[int, int],
) -> Section:
    """The net change, and the local maxima that no other one exceeds for every size."""
    live = [0] * len(MONOMIALS)
    tops: list[Top] = []
    rising, buffer = False, -1
    for position, event in enumerate(events):
        if event >= 0:
            rising, sign = True, 1
        else:
            if rising:
                tops.append((tuple(live), position, buffer))
                rising = False
            event = ~event
            sign = -weight.get(event, 1)
        n, i, j, _ = keys[classes[event]]
        if j == REDUCTION:
            buffer = classes[event] if sign > 0 else -1
        elif j < 0:
            typical = n * outliers.share(i, outliers.TYPICAL_TOKENS)
            live[POSITION[(1, 1) if j == outliers.ROWS else (0, 0)]] += sign * int(typical)
        else:
            live[POSITION[i, j]] += sign * n
    if rising:
        tops.append((tuple(live), len(events), buffer))
    instants = tuple(
        replace(_instant(polynomial, events[:stop], classes, weight), buffer=buffer)
        for polynomial, stop, buffer in _prune(tops)
    )
    net = _instant(tuple(live), events, classes, weight)
    return Section(mark.phase, mark.name, mark.repeats, net, instants)


def _instant(
    polynomial: tuple[int, ...],
    events: Sequence[int],
    classes: Sequence[int],
    weight: Mapping[int, int],
) -> Instant:
    counts: Counter[int] = Counter()
    for event in events:
        if event >= 0:
            counts[classes[event]] += 1
        else:
            counts[classes[~event]] -= weight.get(~event, 1)
    kept = [(c, n) for c, n in counts.items() if n]
    return Instant(polynomial, tuple(c for c, _ in kept), tuple(n for _, n in kept))


def _prune(tops: list[Top]) -> list[Top]:
    """Drop instants that another exceeds in every coefficient: they can never be the highest."""
    kept: list[Top] = []
    for top in sorted(tops, key=lambda t: (-sum(t[0]), -t[2])):
        if not any(top[2] in (-1, other[2]) and all(map(ge, other[0], top[0])) for other in kept):
            kept.append(top)
    return kept
