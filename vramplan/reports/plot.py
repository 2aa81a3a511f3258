"""A Sweep as a picture: PNG or SVG, by matplotlib (vramplan[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import InvalidValue, UserError
from vramplan.reports.sweep import word
from vramplan.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.planner.sweep import Row, Sweep

_KINDS = (".png", ".svg")
_INCHES = (8, 5)
_DOUBLINGS = 8
"""Values whose largest is so many times the smallest are spread by their logarithm."""


def check(path: Path) -> None:
    """Raises UserError for another kind of file, one that exists, one that has no folder, or where
    matplotlib is missing."""
    if path.suffix.lower() not in _KINDS:
        raise InvalidValue("plot", str(path), "a .png or .svg file")
    if path.exists():
        raise UserError(f"{str(path)!r} exists already, and is not overwritten")
    if not path.parent.is_dir():
        raise UserError(f"can't write {str(path)!r}: there is no folder {str(path.parent)!r}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib: python3 -m pip install 'vramplan[plot]'"
        ) from error


def draw(found: Sweep, path: Path) -> None:
    """Memory over the last field that has several values, a line for each combination of the
    others. Of runs that were measured, torch's peak: that is what both have. Raises UserError."""
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    several = [name for name, values in found.over.items() if len(values) > 1] or [*found.over]
    *others, last = several
    measured = any(row.measured_peak is not None for row in found.rows)
    values = found.over[last]
    style = "-" if _are_numbers(values) else ""
    for label, rows in _lines(found, others).items():
        places = [_place(row.values[last], values) for row in rows]
        sizes = [_gib(row.peak_allocated if measured else row.required) for row in rows]
        axes.plot(places, sizes, marker="o", linestyle=style, label=label)
        if measured:
            real = [_gib(row.measured_peak) for row in rows]
            axes.plot(places, real, "x", markersize=9, color="black", label="_")
    _dress(axes, found, last, measured=measured)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error


def _lines(found: Sweep, others: Sequence[str]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.recipe is not None:
            label = ", ".join(f"{name} {word(row.values[name])}" for name in others)
            lines.setdefault(label or "predicted", []).append(row)
    return lines


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _place(value: Any, values: Sequence[Any]) -> float:
    """Numbers where they are, names one after the other."""
    return float(value) if _are_numbers(values) else float(values.index(value))


def _gib(size: int | None) -> float:
    return float("nan") if size is None else size / GIB  # matplotlib leaves NaN out


def _dress(axes: Any, found: Sweep, last: str, *, measured: bool) -> None:
    axes.set_title(found.id)
    axes.set_xlabel(last)
    axes.set_ylabel("peak allocated, GiB" if measured else "required, GiB")
    values = found.over[last]
    if _are_numbers(values) and 0 < _DOUBLINGS * min(values) <= max(values):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks([_place(value, values) for value in values], [word(v) for v in values])
    if measured:
        axes.plot([], [], "x", markersize=9, color="black", label="measured")
    elif found.gpus is not None:
        gpus = found.gpus
        room = gpus.gpu.capacity if gpus.free is None else gpus.free
        name = gpus.gpu.name if gpus.free is None else f"{gpus.gpu.name}, free now"
        axes.axhline(room / GIB, linestyle="--", color="grey", label=name)
    axes.set_ylim(bottom=0, top=1.05 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    if axes.lines:  # else each row is refused, and no card is known
        axes.legend()
