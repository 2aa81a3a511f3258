"""What lives at the highest instant of a step, as terms: by where each storage was made."""

from __future__ import annotations

from collections import Counter

from vramplan.memory import outliers
from vramplan.memory.labels import Label, Labelled
from vramplan.memory.program import Point, Program, powers_of
from vramplan.memory.reduction import REDUCTION
from vramplan.memory.terms import Term

Key = tuple[str, Label, tuple[str, ...], str, tuple[int, int, int], int, int]
LAYERS = "layers"
MADE = {
    "forward": "{rule}",
    "recomputed": "{rule}, recomputed",
    "backward": "gradient of {rule}",
    "added": "sum of gradients of {rule}",
    "summed": "buffer of a sum over tokens",
    "stepped": "{rule} while it steps",
}


def live_terms(
    labelled: Labelled,
    program: Program,
    index: int,
    point: Point,
    layers: int,
    batch: int,
    seq: int,
) -> list[Term]:
    """The storages that live at the peak of section `index`, equal ones of one origin together."""
    table = dict(zip(program.classes, program.sizes(powers_of(batch, seq)), strict=True))
    recording = labelled.recording
    sizes = [
        table[(s[0], s[1], s[2], c)]
        for s, c in zip(recording.sizes, recording.categories, strict=True)
    ]
    counts = _counts(labelled, sizes, index, point)
    groups: Counter[Key] = Counter()
    sections = _sections(labelled)
    for i, count in counts.items():
        key = (
            sections[i],
            labelled.labels[i],
            labelled.savers.get(i, ()),
            recording.categories[i],
            recording.sizes[i],
            labelled.itemsizes[i],
            sizes[i],
        )
        groups[key] += count
    _settle(groups)
    return [_term(key, n, layers, batch, seq) for key, n in groups.items() if n]


def _settle(groups: Counter[Key]) -> None:
    """Between a layer that runs once and those that it leads to, births and deaths can differ in
    their label (not in their size): what one group has too few of is in another."""
    for key, lacking in list(groups.items()):
        if lacking >= 0:
            continue
        for other in list(groups):
            if lacking < 0 < groups[other] and other[3:] == key[3:]:
                moved = min(-lacking, groups[other])
                groups[other] -= moved
                lacking += moved
        groups[key] = lacking


def _term(key: Key, count: int, layers: int, batch: int, seq: int) -> Term:
    section, label, savers, category, (size, i, j), itemsize, each = key
    number = f"{count} x "
    if section == LAYERS and count % layers == 0:
        number = f"{layers} layers x " + (f"{count // layers} x " if count > layers else "")
    if j == REDUCTION:
        formula = f"{number}bytes for {size} outputs, {i} x batch x seq rows"
        figures = f"{count} x {each}"
    elif j < 0:
        tokens = " x batch x seq" if j == outliers.ROWS else ""
        formula = f"{number}{size} B{tokens} x the share of outlier columns"
        figures = f"{count} x {each}, a share of {outliers.share(i, batch * seq):.4f}"
    else:
        symbols = "".join([" x batch"] * i + [" x seq"] * j)
        blocks = "" if size * batch**i * seq**j == each else ", in blocks of 512 B"
        formula = f"{number}{itemsize} B x {size // itemsize}{symbols}{blocks}"
        numbers = "".join([f" x {batch}"] * i + [f" x {seq}"] * j)
        figures = f"{count} x {itemsize} x {size // itemsize}{numbers}"
    return Term(
        category=category,
        what=_what(label, section, savers),
        formula=formula,
        figures=figures,
        bytes=count * each,
        source=label.source,
    )


def _what(label: Label, section: str, savers: tuple[str, ...]) -> str:
    rule = label.rule or "the loss"
    if label.inner not in ("", label.rule):
        rule += f" ({label.inner})"
    made = MADE[label.when].format(rule=rule)
    kept = [saver for saver in savers if saver]
    saved = f", saved by {', '.join(kept)}" if kept and label.when != "backward" else ""
    return f"{label.place or section}: {made}{saved}"


def _sections(labelled: Labelled) -> dict[int, str]:
    """The section in which each storage is born; all layers are one."""
    return {
        event: LAYERS if mark.name.startswith("layer") else mark.name
        for mark, events in labelled.sections()
        for event in events
        if event >= 0
    }


def _counts(labelled: Labelled, sizes: list[int], index: int, point: Point) -> Counter[int]:
    """How many storages each recorded one stands for at the peak, as Program.walk adds them up."""
    sections = labelled.sections()
    copies = {e: mark.repeats for mark, events in sections for e in events if e >= 0}
    copies.update(labelled.recording.copies)
    counts: Counter[int] = Counter()

    def change(event: int, times: int, gathers: bool) -> int:
        i, n = (event, times) if event >= 0 else (~event, -times)
        if event < 0 and gathers:
            n *= copies[i]
        counts[i] += n
        return n * sizes[i]

    live = 0
    for k, (mark, events) in enumerate(sections[: index + 1]):
        times = mark.repeats if k < index else (mark.repeats - 1) * point.last
        live += sum(change(event, times, mark.gathers) for event in events)
    mark, events = sections[index]
    for event in events:
        if live == point.peak:
            break
        live += change(event, 1, mark.gathers)
    assert live == point.peak, (mark, live, point.peak)
    return counts
