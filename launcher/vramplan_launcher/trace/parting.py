"""Where two sides of a section part: the first operation, and all storages without a counterpart."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from vramplan.memory.estimate import Estimate
from vramplan.memory.labels import Label, Labelled, labelled_step
from vramplan.memory.program import CUDA_BLOCK, POSITION, powers_of, reckoned
from vramplan.memory.record import Mark
from vramplan.reports.comparison import Parting
from vramplan.units import format_bytes
from vramplan_launcher.trace.stretches import Seen, Stretch

if TYPE_CHECKING:
    from vramplan_launcher.trace.counting import Storage

SHOWN = 4
CRUMB = 4096
"""Bytes up to which a storage may be on one side alone: scalars."""
KEEPS = "what it keeps"
HIGHEST = "its highest instant"


def named(needed: Estimate, phase: str, mine: Stretch, theirs: Seen, what: str) -> Parting:
    """Names what one side has and the other has not, in a section where they differ in `what`."""
    keeps = what == KEEPS
    sizes = (mine.kept, theirs.kept) if keeps else (mine.highest, theirs.highest)
    ends = (mine.end, theirs.end) if keeps else (mine.peak, theirs.peak)
    recipe = needed.recipe
    scale = powers_of(recipe.batch_size, recipe.seq_len)
    labelled = labelled_step(needed.architecture, needed.policy)
    sections = [s for s in labelled.sections() if _within(s[0], phase, mine.name)]
    rules: dict[int, dict[str, None]] = {}
    for event in (e for _, events in sections for e in events if e >= 0):
        rules.setdefault(_rounded(labelled, event, scale), {})[_rule(labelled.labels[event])] = None
    ops: dict[int, dict[str, None]] = {}
    for storage in theirs.storages:
        ops.setdefault(storage.size, {})[_op(storage)] = None
    return Parting(
        phase=phase,
        section=mine.name,
        what=what,
        first=_first(
            [(size, _rule(label)) for size, label in _made(labelled, sections, scale, keeps)],
            [(s.size, _op(s)) for s in (theirs.staying if keeps else theirs.living)],
            (sizes[0] - sizes[1], sizes[1] - sizes[0]),
        ),
        estimate=ends[0] - mine.start,
        trace=ends[1] - theirs.start,
        only_in_estimate=_listed(sizes[0] - sizes[1], {s: list(r) for s, r in rules.items()}),
        only_in_trace=_listed(sizes[1] - sizes[0], {s: list(o) for s, o in ops.items()}),
    )


# --- the first of them ----------------------------------------------------------------------

Made = tuple[int, str]
"""A storage's bytes, and what made it."""


def _first(
    mine: Sequence[Made], theirs: Sequence[Made], only: tuple[Tally[int], Tally[int]]
) -> str:
    """The first operation, in the order of the step, that makes what the other side has not.

    Both sides' storages are laid beside each other in the order in which they are born; what has
    a counterpart elsewhere in the section is passed over.
    """
    sides = [[s for s in side if s[0] > CRUMB] for side in (mine, theirs)]
    one, two = ([size for size, _ in side] for side in sides)
    before = ""
    for kind, low, high, start, stop in SequenceMatcher(None, one, two, False).get_opcodes():
        if kind == "equal":
            before = sides[1][stop - 1][1]
            continue
        for name, only_here, part in (
            ("trace", only[1], sides[1][start:stop]),
            ("estimate", only[0], sides[0][low:high]),
        ):
            found = next((made for made in part if only_here[made[0]] > 0), None)
            if found is not None:
                return _sentence(name, found, before)
    return ""


def _sentence(side: str, made: Made, before: str) -> str:
    size, what = made
    where = f", after {before}" if before and side == "estimate" else ""
    return f"{what} ({format_bytes(size)}, only in the {side}{where})"


def _made(
    labelled: Labelled,
    sections: Sequence[tuple[Mark, list[int]]],
    scale: Sequence[int],
    keeps: bool,
) -> list[tuple[int, Label]]:
    """What the estimate's sections keep, or what lives at their highest instant, as it is born."""
    alive: dict[int, int] = {}
    earlier: list[int] = []
    highest: list[int] = []
    level = most = 0
    for mark, events in sections:
        before = {*alive}
        for event in events:
            if event >= 0:
                alive[event] = _rounded(labelled, event, scale)
                level += alive[event]
            elif ~event in alive:
                level -= alive.pop(~event)
            if level > most:
                most, highest = level, [*earlier, *alive]
        own = [event for event in alive if event not in before]
        earlier += own * (mark.repeats - 1)
    shown = [*earlier, *alive] if keeps else highest
    return [(_rounded(labelled, e, scale), labelled.labels[e]) for e in shown]


def _within(mark: Mark, phase: str, stretch: str) -> bool:
    """Whether a recorded section is part of a stretch ("layer 0", "layers 1 to 2", "head")."""
    if mark.phase != phase:
        return False
    if mark.name.startswith("layer") or stretch.startswith("layer"):
        return set(re.findall(r"\d+", mark.name)) == set(re.findall(r"\d+", stretch))
    return (mark.name == "inputs") == (stretch == "inputs")


# --- names ----------------------------------------------------------------------------------


def _op(storage: Storage) -> str:
    return f"{storage.op} {_place(storage)}".strip()


def _rule(label: Label) -> str:
    name = f"{label.inner or label.rule} {label.when} in {label.place}".strip()
    return name.removesuffix(" in")


def _rounded(labelled: Labelled, storage: int, scale: Sequence[int]) -> int:
    nbytes = _bytes(labelled.recording.sizes[storage], scale)
    return -(-nbytes // CUDA_BLOCK) * CUDA_BLOCK


def _place(storage: Storage) -> str:
    return f"in {storage.module} {list(storage.shape)} {storage.dtype}" if storage.module else ""


def _listed(only: Tally[int], makers: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """The largest storages without a counterpart, and what may have made them."""
    out = []
    for size, count in sorted(only.items(), key=lambda item: -item[0] * item[1])[:SHOWN]:
        times = f"{count} x " if count > 1 else ""
        names = makers.get(size, ())
        more = f" (or {len(names) - 2} more)" if len(names) > 2 else ""
        out.append(f"{times}{format_bytes(size)}: {' or '.join(names[:2])}{more}".rstrip(": "))
    return tuple(out)


def _bytes(size: tuple[int, int, int], scale: Sequence[int]) -> int:
    from vramplan.memory.program import POSITION

    n, i, j = size
    return n * scale[POSITION[i, j]] if j >= 0 else reckoned(n, i, j, scale)
