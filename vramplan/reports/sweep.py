"""A Sweep as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vramplan.planner.cards import in_use
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.sweep import Row, Sweep


def show(found: Sweep, look: Look = Look()) -> str:  # noqa: B008
    """The whole report, at most `look.width` columns where names allow it."""
    return "\n".join(_lines(found, look))


def _lines(found: Sweep, look: Look) -> Iterator[str]:
    where = "" if found.gpus is None else f" on {found.gpus}"
    count = len(found.rows)
    for line in wrap(f"{found.id}{where}: {count} run{'s' if count > 1 else ''}", look.width):
        yield look.paint(line, "heading")
    measured = any(row.measured_peak is not None for row in found.rows)
    widths = {
        name: max(len(_short(name)), *(len(word(value)) for value in values)) + 2
        for name, values in found.over.items()
    }
    head = "".join(f"{_short(name):>{width}}" for name, width in widths.items())
    head += f"{'peak':>11}{'required':>11}"
    if found.gpus is not None:
        head += f"{'fits':>6}{'s a step':>10}"
        head += "" if measured else f"{'tokens/s':>10}"  # two columns more would be too many
    if measured:
        head += f"{'measured':>11}{'error':>8}"
    yield look.paint(head, "heading")
    for row in found.rows:
        yield from _row(row, widths, found, measured, look)
    yield from wrap(in_use(found.gpus), look.width)


def _row(
    row: Row, widths: dict[str, int], found: Sweep, measured: bool, look: Look
) -> Iterator[str]:
    line = "".join(f"{word(row.values[name]):>{width}}" for name, width in widths.items())
    if row.recipe is None:
        first, *more = wrap(f"refused: {row.why}", max(20, look.width - len(line) - 2))
        yield f"{line}  {first}"
        yield from (" " * (len(line) + 2) + rest for rest in more)
        return
    line += f"{format_bytes(row.peak_allocated or 0):>11}{format_bytes(row.required or 0):>11}"
    if found.gpus is not None:
        line += look.paint(f"{'yes' if row.fits else 'no':>6}", "good" if row.fits else "bad")
        line += f"{row.seconds or 0:>10.3g}"
        line += "" if measured else f"{row.tokens_per_second or 0:>10,.0f}"
    if measured and row.measured_peak is not None:
        error = 100 * ((row.peak_allocated or 0) / row.measured_peak - 1)
        line += f"{format_bytes(row.measured_peak):>11}{error:>+7.2f}%"
    yield line
    if row.why:
        yield from (f"    {part}" for part in wrap(f"its run failed: {row.why}", look.width - 4))


def _short(name: str) -> str:
    return name.removeprefix("lora_").removeprefix("gradient_") if len(name) > 12 else name


def word(value: object) -> str:
    """A value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
