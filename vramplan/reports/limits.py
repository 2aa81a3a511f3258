"""How far a recipe goes, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vramplan.planner.cards import in_use
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus
    from vramplan.planner.limits import Limit

_NAMES = {"seq_len": "longest sequence", "batch_size": "largest batch"}
_UNITS = {"seq_len": "token", "batch_size": "sequence"}


def show(model: str, gpus: Gpus, found: Sequence[Limit], look: Look = Look()) -> str:  # noqa: B008
    """The whole report."""
    lines = [look.paint(line, "heading") for line in wrap(f"{model} on {gpus}", look.width)]
    for limit in found:
        lines += _limit(limit, look)
    lines += wrap(in_use(gpus), look.width)
    return "\n".join(lines)


def _limit(limit: Limit, look: Look) -> Iterator[str]:
    name = _NAMES[limit.field]
    other = "batch_size" if limit.field == "seq_len" else "seq_len"
    with_ = _counted(getattr(limit.recipe, other), other)
    at = f"of {with_} each" if limit.field == "batch_size" else f"in batches of {with_}"
    if not limit.largest:
        short = format_bytes((limit.beyond or 0) - limit.available)
        one = f"1 of {with_}" if limit.field == "batch_size" else f"1 token {at}"
        yield from _lines(f"{name}: none, even {one} is {short} too much", look, "bad")
        return
    yield from _lines(f"{name}: {_counted(limit.largest, limit.field)} {at}", look, "good")
    said = f"needs {format_bytes(limit.required or 0, digits=2)} of "
    said += f"{format_bytes(limit.available, digits=2)}"
    if limit.beyond is None:
        said += f"; {limit.why}"
    else:
        said += f"; {limit.largest + 1:,} would need {format_bytes(limit.beyond, digits=2)}, "
        said += f"{format_bytes(limit.beyond - limit.available, digits=1)} too much"
    yield from (f"    {line}" for line in wrap(said, look.width - 4))


def _lines(text: str, look: Look, style: str) -> Iterator[str]:
    first, *more = wrap(text, look.width - 4)
    yield look.paint(f"  {first}", style)
    yield from (look.paint(f"    {line}", style) for line in more)


def _counted(number: int, field: str) -> str:
    unit = _UNITS[field]
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"
