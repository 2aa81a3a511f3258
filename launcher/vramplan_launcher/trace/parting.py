"""Where the two sides of a section part: the first operation, and what has no counterpart."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Mapping, Sequence
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
        ),
        estimate=ends[0] - mine.start,
        trace=ends[1] - theirs.start,
        only_in_estimate=_listed(sizes[0] - sizes[1], {s: list(r) for s, r in rules.items()}),
        only_in_trace=_listed(sizes[1] - sizes[0], {s: list(o) for s, o in ops.items()}),
    )


# --- the first of them ----------------------------------------------------------------------

Made = tuple[int, str]
"""A storage's bytes, and what made it."""

KINDS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "dense", "matmul", "product"), "product"),
    **dict.fromkeys(("gemm_4bit", "linear_4bit", "int8_mixed_scaled_mm", "linear_int8"), "product"),
    **dict.fromkeys(("native_dropout", "dropout"), "dropout"),
    **dict.fromkeys(("native_layer_norm", "layer_norm"), "norm"),
    **dict.fromkeys(("_to_copy", "to", "float", "full", "lower"), "to"),
    **dict.fromkeys(("_softmax", "softmax", "safe_softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("_log_softmax", "cross_entropy"), "loss"),
}
"""What torch's operations and the rules of an estimate have in common, where names differ."""
GAP, UNLIKE = 2, 1
"""Costs of a storage without a counterpart, and of one that another kind of operation makes."""
MOST = 2_000_000
"""Pairs that are looked at, at most."""


def _first(mine: Sequence[Made], theirs: Sequence[Made]) -> str:
    """The first operation, in the order of the step, that makes what the other side has not."""
    one, two = ([made for made in side if made[0] > CRUMB] for side in (mine, theirs))
    if len(one) * len(two) > MOST:
        return ""
    before = ""
    for here, there in _aligned(one, two):
        if here is None and there is not None:
            return f"{there[1]} ({format_bytes(there[0])}, only in the trace)"
        if there is None and here is not None:
            where = f", after {before}" if before else ""
            return f"{here[1]} ({format_bytes(here[0])}, only in the estimate{where})"
        before = there[1] if there is not None else before
    return ""


def _aligned(one: list[Made], two: list[Made]) -> list[tuple[Made | None, Made | None]]:
    """Both in their order, equal sizes beside each other: the way that costs least."""
    kinds = [[_kind(what) for _, what in side] for side in (one, two)]
    width = len(two) + 1
    cost = [[0] * width for _ in range(len(one) + 1)]
    for i in range(len(one), -1, -1):
        for j in range(len(two), -1, -1):
            ways = [cost[i + 1][j] + GAP] if i < len(one) else []
            ways += [cost[i][j + 1] + GAP] if j < len(two) else []
            if i < len(one) and j < len(two) and one[i][0] == two[j][0]:
                ways.append(cost[i + 1][j + 1] + UNLIKE * (kinds[0][i] != kinds[1][j]))
            cost[i][j] = min(ways, default=0)
    out: list[tuple[Made | None, Made | None]] = []
    i = j = 0
    while i < len(one) or j < len(two):
        here = one[i] if i < len(one) else None
        there = two[j] if j < len(two) else None
        if here and there and here[0] == there[0]:
            unlike = UNLIKE * (kinds[0][i] != kinds[1][j])
            if cost[i][j] == cost[i + 1][j + 1] + unlike:
                out.append((here, there))
                i, j = i + 1, j + 1
                continue
        if here and cost[i][j] == cost[i + 1][j] + GAP:
            out.append((here, None))
            i += 1
        else:
            out.append((None, there))
            j += 1
    return out


def _kind(what: str) -> str:
    """ "aten.mm.default in model.layers.0 ..." and "dense forward in Llama.mlp": a product."""
    name = what.split(" > ")[-1].split(" ")[0]
    name = name.split(".")[1] if "." in name else name
    return KINDS.get(name, name)


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
    n, i, j = size
    return n * scale[POSITION[i, j]] if j >= 0 else reckoned(n, i, j, scale)
