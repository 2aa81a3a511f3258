"""Estimate against trace: what is compared, as data, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vramplan.reports.text import _CATEGORIES, _PHASES, wrap
from vramplan.units import format_bytes

WIDTH = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two. Bytes; `phases` holds (end, peak) by phase, `breakdown` is at the peak."""

    peak_allocated: int
    peak_phase: str
    phases: Mapping[str, tuple[int, int]]
    breakdown: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parting:
    """The first section of the step where the two differ."""

    phase: str
    section: str
    """ "inputs", "layer 3", "head", ..."""
    what: str
    """Whether they part in what the section keeps, or in its highest instant."""
    first: str = ""
    """The first operation of the section that makes what the other side has not."""
    estimate: int
    trace: int
    only_in_estimate: tuple[str, ...]
    """Storages without a counterpart of the same size: bytes and the rule that makes them."""
    only_in_trace: tuple[str, ...]
    """The same of the trace: bytes, the operation, its module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """An estimate beside its trace."""

    id: str
    recipe: Mapping[str, Any]
    estimate: Side
    trace: Side
    parting: Parting | None
    """None: no section differs by more than what is lost in rounding and scalars."""
    tolerance: int
    """Bytes by which a section may differ and count as equal."""

    @property
    def error(self) -> float:
        """Percent of the trace's peak; plus: the estimate is too much."""
        return percent(self.estimate.peak_allocated, self.trace.peak_allocated)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": 1, "error_percent": round(self.error, 4), **asdict(self)}


def percent(mine: int, other: int) -> float:
    """By how much `mine` exceeds `other`."""
    if other == 0:
        return 0.0 if mine == 0 else 100.0
    return 100 * (mine - other) / other


def render(c: Comparison) -> str:
    """The whole report, at most 80 columns wide."""
    return "\n".join(_lines(c))


def _lines(c: Comparison) -> Iterator[str]:
    yield f"{c.id}: estimate {c.error:+.3f} % against trace, at the peak"
    yield ""
    yield f"  {'':<22}{'estimate':>11}{'trace':>11}{'difference':>13}"
    yield _row("peak", c.estimate.peak_allocated, c.trace.peak_allocated)
    for name, (_, peak) in c.trace.phases.items():
        yield _row(f"{_PHASES[name]}, peak", c.estimate.phases[name][1], peak)
    for name, (end, _) in c.trace.phases.items():
        yield _row(f"{_PHASES[name]}, end", c.estimate.phases[name][0], end)
    yield ""
    yield f"At the peak (estimate: {_PHASES[c.estimate.peak_phase]}, trace: " + (
        f"{_PHASES[c.trace.peak_phase]})"
    )
    for category, size in c.trace.breakdown.items():
        mine = c.estimate.breakdown.get(category, 0)
        if mine or size:
            yield _row(_CATEGORIES.get(category, category), mine, size)
    yield ""
    yield from _parting(c)


def _row(name: str, mine: int, other: int) -> str:
    difference = mine - other
    shown = ("-" if difference < 0 else "+") + format_bytes(abs(difference))
    return (
        f"  {name:<22}{format_bytes(mine):>11}{format_bytes(other):>11}"
        f"{shown:>13}{percent(mine, other):>+9.3f} %"
    )


def _parting(c: Comparison) -> Iterator[str]:
    p = c.parting
    if p is None:
        yield from wrap(
            f"They don't part: no section of the step differs by more than "
            f"{format_bytes(c.tolerance)}.",
            WIDTH,
        )
        return
    yield from wrap(
        f"They first part in {_PHASES[p.phase]}, {p.section}, in {p.what}: estimate "
        f"{format_bytes(p.estimate)}, trace {format_bytes(p.trace)}.",
        WIDTH,
    )
    if p.first:
        yield from wrap(f"The first op: {p.first}.", WIDTH)
    for title, only in (("estimate", p.only_in_estimate), ("trace", p.only_in_trace)):
        if only:
            yield f"  Only in the {title}:"
        for line in only:
            first, *more = wrap(line, WIDTH - 4)
            yield f"    {first}"
            yield from (f"      {rest}" for rest in more)
