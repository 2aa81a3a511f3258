"""A training step as sections of births and deaths, compiled once, evaluated for any batch.

Compiling records a step (record.py) and reduces every section to its net change and to the
instants that can be its highest. Evaluating is arithmetic: a section that repeats r times shifts
what follows by r times its net change, and its highest instant is in its first or its last
repetition. Instants are polynomials in batch and sequence; the highest is then added up exactly,
with every storage rounded as the allocator rounds it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import ge, mul
from typing import NamedTuple

from vramplan.memory import outliers
from vramplan.memory.kinds import record_kinds
from vramplan.memory.precision import Policy
from vramplan.memory.record import Mark, Recorder, Recording, uncollected
from vramplan.memory.reduction import REDUCTION, buffer_bytes
from vramplan.models.architecture import Architecture

CUDA_BLOCK = 512  # kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp

Key = tuple[int, int, int, str]  # bytes x batch^i x sequence^j (or REDUCTION), category
Top = tuple[tuple[int, ...], int, int]  # an instant: polynomial, position, reduction's buffer
MONOMIALS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2))  # exponents of batch and sequence
POSITION = {exponents: k for k, exponents in enumerate(MONOMIALS)}


class Instant(NamedTuple):
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


class Section(NamedTuple):
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


class Point(NamedTuple):
    """A section evaluated: live bytes at its end, and at its highest instant."""

    section: Section
    end: int
    peak: int
    instant: Instant | None
    """The highest instant; None: the section's start."""
    last: bool
    """Whether the peak falls in the last repetition."""


class Program(NamedTuple):
    """One micro-batch, forward and backward."""

    sections: tuple[Section, ...]
    classes: tuple[Key, ...]
    epilogues: int = 0
    """Threads that keep a cuBLASLt workspace."""

    def sizes(self, powers: Sequence[int]) -> list[int]:
        """Bytes of each class as the allocator hands them out, in blocks of 512."""
        asked = (
            n * powers[POSITION[i, j]] if j >= 0 else reckoned(n, i, j, powers)
            for n, i, j, _ in self.classes
        )
        return [-(-size // CUDA_BLOCK) * CUDA_BLOCK for size in asked]

    def walk(self, batch: int, seq: int) -> list[Point]:
        """The sections in order, with bytes relative to the start of the step."""
        powers = powers_of(batch, seq)
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
        sizes = self.sizes(powers_of(batch, seq))
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


def powers_of(batch: int, seq: int) -> tuple[int, ...]:
    """The value of each of MONOMIALS."""
    return tuple(batch**i * seq**j for i, j in MONOMIALS)


@lru_cache(maxsize=1024)
def compile_step(arch: Architecture, policy: Policy) -> Program:
    """Record one micro-batch of `arch` under `policy` and reduce it."""
    with uncollected():
        if policy.in_backward is None:
            return reduce_recording(record_kinds(lambda: Recorder(policy), arch))
        from vramplan.memory.stepping_tape import record_stepping

        return reduce_recording(record_stepping(arch, policy))


def reduce_recording(recording: Recording) -> Program:
    """Sections with their net changes and the instants that can be highest."""
    table: dict[Key, int] = {}
    classes = [
        table.setdefault((*size, category), len(table))
        for size, category in zip(recording.sizes, recording.categories, strict=True)
    ]
    of_class = [_effect(key) for key in table]
    effects = [of_class[c] for c in classes]
    copies = _birth_repeats(recording)
    sections = []
    found: dict[tuple[int, ...], Section] = {}  # layers of a kind can share their events (kinds.py)
    for mark, following in pairwise(recording.marks):
        events = tuple(recording.events[mark.start : following.start])
        section = found.get(events)
        if section is None or mark.gathers:
            section = _reduce(mark, events, classes, effects, copies if mark.gathers else {})
            found[events] = section
        sections.append(section._replace(phase=mark.phase, name=mark.name, repeats=mark.repeats))
    return Program(tuple(sections), tuple(table), recording.epilogues)


def _birth_repeats(recording: Recording) -> dict[int, int]:
    """For storages: how many of them are born, in all sections and their repetitions."""
    out: dict[int, int] = {}
    for mark, following in pairwise(recording.marks):
        for event in recording.events[mark.start : following.start]:
            if event >= 0:
                out[event] = out.get(event, 0) + mark.repeats
    out.update(recording.copies)
    return out


def _effect(key: Key) -> tuple[int, int]:
    """(monomial, coefficient) that a storage of a class adds; -1 of a reduction's buffer."""
    n, i, j, _ = key
    if j == REDUCTION:
        return -1, 0
    if j < 0:
        typical = n * outliers.share(i, outliers.TYPICAL_TOKENS)
        return POSITION[(1, 1) if j == outliers.ROWS else (0, 0)], int(typical)
    return POSITION[i, j], n


def _reduce(
    mark: Mark,
    events: Sequence[int],
    classes: Sequence[int],
    effects: Sequence[tuple[int, int]],
    copies: Mapping[int, int],
) -> Section:
    """The net change, and the local maxima that no other one exceeds for every size.

    `classes`, `effects`: by storage. `copies`: of the storages freed here that stand for several,
    how many.
    """
    live = [0] * len(MONOMIALS)
    tops: list[Top] = []
    rising, buffer = False, -1
    for position, event in enumerate(events):
        if event >= 0:
            rising = True
            monomial, coefficient = effects[event]
            if monomial < 0:
                buffer = classes[event]
            else:
                live[monomial] += coefficient
            continue
        if rising:
            tops.append((tuple(live), position, buffer))
            rising = False
        monomial, coefficient = effects[~event]
        if monomial < 0:
            buffer = -1
        elif copies:
            live[monomial] -= coefficient * copies.get(~event, 1)
        else:
            live[monomial] -= coefficient
    if rising:
        tops.append((tuple(live), len(events), buffer))
    net = (tuple(live), len(events), -1)
    *instants, change = _instants([*_prune(tops), net], events, classes, copies)
    return Section(mark.phase, mark.name, mark.repeats, change, tuple(instants))


def _instants(
    tops: Sequence[Top], events: Sequence[int], classes: Sequence[int], copies: Mapping[int, int]
) -> list[Instant]:
    """Instants in the order of `tops`, in one pass through the events."""
    counts: defaultdict[int, int] = defaultdict(int)
    found: dict[int, Instant] = {}
    passed = 0
    for k in sorted(range(len(tops)), key=lambda k: tops[k][1]):
        polynomial, position, buffer = tops[k]
        for event in events[passed:position]:
            if event >= 0:
                counts[classes[event]] += 1
            else:
                counts[classes[~event]] -= copies.get(~event, 1)
        passed = position
        kept = [pair for pair in counts.items() if pair[1]]
        found[k] = Instant(
            polynomial, tuple([c for c, _ in kept]), tuple([n for _, n in kept]), buffer
        )
    return [found[k] for k in range(len(tops))]


def _prune(tops: list[Top]) -> list[Top]:
    """Drop instants that another exceeds in every coefficient: they can never be the highest."""
    kept: list[Top] = []
    unlike = {(top[0], top[2]): top for top in reversed(tops)}  # the first of equal ones
    for top in sorted(unlike.values(), key=lambda t: (-sum(t[0]), -t[2])):
        if not any(top[2] in (-1, other[2]) and all(map(ge, other[0], top[0])) for other in kept):
            kept.append(top)
    return kept
