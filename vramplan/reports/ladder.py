"""A Ladder as text: a row a rung, then the checklist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vramplan.planner.cards import in_use
from vramplan.reports.text import Look, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.planner.ladder import Ladder, Rung

_BAR = 14


def show(found: Ladder, look: Look = Look()) -> str:  # noqa: B008
    """The whole report, at most `look.width` columns."""
    sections = (_head, _rungs, _measured, _skipped, _list, _in_use)
    parts = [section(found, look) for section in sections]
    return "\n\n".join("\n".join(part) for lines in parts if (part := list(lines)))


def _head(found: Ladder, look: Look) -> Iterator[str]:
    where = "" if found.gpus is None else f" on {found.gpus}"
    for line in wrap(f"{found.id}{where}: each saving on top of those before", look.width):
        yield look.paint(line, "heading")
    recipe = found.rungs[0].recipe
    yield from wrap(
        f"It begins with {'LoRA' if recipe.lora else 'full fine-tuning'} in {recipe.dtype}, "
        f"{recipe.attention} attention, {recipe.optimizer}, {recipe.batch_size} x "
        f"{recipe.seq_len} tokens.",
        look.width,
    )


def _rungs(found: Ladder, look: Look) -> Iterator[str]:
    timed = found.gpus is not None
    head = f"{'':<26}{'required':>11}{'saves':>11}"
    yield look.paint(head + (f"{'fits':>6}{'time':>9}" if timed else ""), "heading")
    most = max(rung.required for rung in found.rungs)
    first = found.rungs[0].seconds
    for rung in found.rungs:
        yield _row(rung, most, first, look)
    if any(rung.alters_training for rung in found.rungs):
        yield "  * changes what is learned"


def _row(rung: Rung, most: int, first: float | None, look: Look) -> str:
    mark = " *" if rung.alters_training else ""
    saving = "" if not rung.saving else format_bytes(rung.saving)
    row = f"  {(rung.name + mark)[:26]:<24}{format_bytes(rung.required):>11}{saving:>11}"
    if rung.fits is not None:
        row += look.paint(f"{'yes' if rung.fits else 'no':>6}", "good" if rung.fits else "bad")
    if rung.seconds is not None and first:
        row += f"{rung.seconds / first:>7.2f} x"
    bar = ("\u2588" if look.blocks else "#") * round(_BAR * rung.required / most)
    return f"{row}  {look.paint(bar, 'bar')}" if look.width >= 80 else row


def _measured(found: Ladder, look: Look) -> Iterator[str]:
    """Peaks of real runs beside what was predicted of them."""
    run = [rung for rung in found.rungs if rung.measured_peak is not None or rung.why]
    if run:
        head = f"{'Run for real':<26}{'peak':>11}{'measured':>11}{'error':>9}"
        yield look.paint(head, "heading")
    for rung in run:
        row = f"  {rung.name[:24]:<24}{format_bytes(rung.peak_allocated):>11}"
        if rung.measured_peak is None:
            first, *more = wrap(f"failed: {rung.why}", look.width - len(row) - 2)
            yield f"{row}  {first}"
            yield from (" " * (len(row) + 2) + line for line in more)
        else:
            error = 100 * (rung.peak_allocated / rung.measured_peak - 1)
            yield f"{row}{format_bytes(rung.measured_peak):>11}{error:>+8.2f}%"


def _skipped(found: Ladder, look: Look) -> Iterator[str]:
    for name, why in found.skipped:
        first, *more = wrap(f"Without {name}: {why}.", look.width)
        yield first
        yield from (f"  {line}" for line in more)


def _in_use(found: Ladder, look: Look) -> Iterator[str]:
    yield from wrap(in_use(found.gpus), look.width)


def _list(found: Ladder, look: Look) -> Iterator[str]:
    yield look.paint("The checklist: single changes to the first row, by what they save", "heading")
    for number, change in enumerate(found.checklist, 1):
        mark = " *" if change.alters_training else ""
        flags = " ".join(change.flags)
        name = f"{number}. {change.name}{mark}"
        row = f"  {name:<28}{format_bytes(change.saving):>11}  "
        first, *more = wrap(flags, look.width - len(row)) or [""]
        yield (row + first).rstrip()
        yield from (" " * len(row) + line for line in more)
    if not found.checklist:
        yield "  Nothing that vramplan knows of lowers it."
