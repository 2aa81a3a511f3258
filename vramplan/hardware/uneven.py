"""Several kinds of cards in one run: every rank needs as much, so the smallest card decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.gpu import Gpus


def parse_cards(text: str) -> Gpus:
    """The cards that `text` names, as parse_gpu; or several, such as "4xA100-80GB,4xA100-40GB".

    Of several: the one with least memory, counted as often as there are cards. Raises UnknownName.
    """
    if "," not in text:
        return parse_gpu(text)
    named = [parse_gpu(part.strip()) for part in text.split(",")]
    return replace(min(named, key=_room), count=sum(gpus.count for gpus in named))


def smallest_of(found: Iterable[Gpus], ranks: int) -> Gpus | None:
    """Of a machine's cards: with those of most room chosen for `ranks`, the one of least.

    None where there are none; where there are fewer than `ranks`, the least of all.
    """
    cards = [gpus for gpus in found for _ in range(gpus.count)]
    chosen = sorted(cards, key=_room, reverse=True)[:ranks]
    return chosen[-1] if chosen else None


def _room(gpus: Gpus) -> int:
    return gpus.gpu.capacity if gpus.free is None else gpus.free
