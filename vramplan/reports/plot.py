"""A Sweep as a picture: PNG or SVG, by matplotlib (vramplan[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import InvalidValue, UserError
from vramplan.units import GIB

if TYPE_CHECKING:
    from vramplan.planner.sweep import Row, Sweep

_KINDS = (".png", ".svg")
_INCHES = (8, 5)


def draw(found: Sweep, path: Path) -> None:
    """Required memory over the last swept field, a line for each combination of the others.

    Raises UserError for another kind of file, one that exists, or where matplotlib is missing.
    """
    if path.suffix.lower() not in _KINDS:
        raise InvalidValue("plot", str(path), "a .png or .svg file")
    if path.exists():
        raise UserError(f"{str(path)!r} exists already, and is not overwritten")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "--plot needs matplotlib: python3 -m pip install 'vramplan[plot]'"
        ) from error
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    *others, last = found.over
    for label, rows in _lines(found, others).items():
        places = [_place(row.values[last], found.over[last]) for row in rows]
        axes.plot(places, [_gib(row.required) for row in rows], marker="o", label=label)
        real = [(p, _gib(r.measured_peak)) for p, r in zip(places, rows, strict=True)]
        if any(row.measured_peak is not None for row in rows):
            axes.plot(*zip(*real, strict=True), "x", color="black", label=f"{label}, measured")
    _dress(axes, found, last)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error


def _lines(found: Sweep, others: list[str]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in found.rows:
        if row.recipe is not None:
            label = ", ".join(f"{name} {row.values[name]}" for name in others) or "required"
            lines.setdefault(label, []).append(row)
    return lines


def _place(value: Any, values: tuple[Any, ...]) -> float:
    """Numbers where they are, names one after the other."""
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return float(value) if numbers else float(values.index(value))


def _gib(size: int | None) -> float:
    return float("nan") if size is None else size / GIB  # matplotlib leaves NaN out


def _dress(axes: Any, found: Sweep, last: str) -> None:
    axes.set_title(found.id)
    axes.set_xlabel(last)
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    values = found.over[last]
    places = [_place(value, values) for value in values]
    axes.set_xticks(places, [str(value) for value in values])
    if found.gpus is not None:
        gpu = found.gpus.gpu
        axes.axhline(gpu.capacity / GIB, linestyle="--", color="grey", label=gpu.name)
    axes.grid(alpha=0.3)
    axes.legend()
