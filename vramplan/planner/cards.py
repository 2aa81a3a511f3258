"""Which cards a plan is for: named ones, or those of this machine; and what the next larger is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from vramplan.errors import UserError
from vramplan.hardware.catalogue import all_gpus, parse_gpu
from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.units import format_bytes

Cards = str | Gpu | Gpus | Sequence["str | Gpu | Gpus"] | None
"""What `fit` takes: a name or size ("4xA100-80GB,2xL40S": several), a card, equal cards, several of
these, or None."""


def groups_of(cards: Cards) -> tuple[list[Gpus], list[str]]:
    """Groups of equal cards to plan for, and what is to be said about them.

    None: the cards in this machine. Of unlike cards each kind by itself is a group, and all
    together are one, in which each counts as the one with least memory.

    Raises UserError where there is no card, or UnknownName.
    """
    found = _here() if cards is None else [_one(card) for card in _listed(cards)]
    notes = [note for group in found if (note := in_use(group))]
    if len(found) < 2:
        return found, notes
    notes.append(
        f"The cards differ ({' and '.join(map(str, found))}): each kind by itself is considered, "
        "and all of them together, where the one with least memory and the slowest decide."
    )
    return [*found, _together(found)], notes


def _listed(cards: Cards) -> list[str | Gpu | Gpus]:
    if isinstance(cards, str):
        return [part.strip() for part in cards.split(",")]
    if isinstance(cards, (Gpu, Gpus)):
        return [cards]
    assert cards is not None
    listed = list(cards)
    if not listed:
        raise UserError("no GPU named: give a size or a name, such as 24GB or 4xA100-80GB")
    return listed


def _one(card: str | Gpu | Gpus) -> Gpus:
    if isinstance(card, str):
        return parse_gpu(card)
    return Gpus(gpu=card) if isinstance(card, Gpu) else card


def _here() -> list[Gpus]:
    from vramplan.hardware.nvml import gpus_here

    found, reason = gpus_here()
    if not found:
        raise UserError(
            f"{reason} Name the card to plan for: --gpu 24GB, --gpu rtx-4090 or --gpu 4xA100-80GB"
        )
    return found


def in_use(group: Gpus | None) -> str:
    """What is to be said of cards that are not all ours; empty: nothing."""
    if group is None or group.free is None:
        return ""
    taken = group.gpu.capacity - group.free
    if not group.others and taken <= group.gpu.capacity // 100:
        return ""
    who = f"{group}: the fullest of them has" if group.count > 1 else f"{group} has"
    said = f"{who} {format_bytes(group.free)} free of {format_bytes(group.gpu.capacity)}"
    if group.others:
        pids = ", ".join(str(process.pid) for process in group.others)
        said += f"; other processes use it ({pids})"
    return f"{said}. What is free now is what counts."


def _together(groups: list[Gpus]) -> Gpus:
    """All of them as equal cards: the least of every figure."""

    def room(group: Gpus) -> int:
        return group.gpu.capacity if group.free is None else group.free

    def least(name: str) -> int | None:
        known = [getattr(group.gpu, name) for group in groups]
        return None if None in known else min(known)

    weakest = min(groups, key=room)
    gpu = replace(
        weakest.gpu,
        supports_bf16=all(group.gpu.supports_bf16 for group in groups),
        supports_flash_attention_2=all(g.gpu.supports_flash_attention_2 for g in groups),
        bandwidth=least("bandwidth"),
        fp16=least("fp16"),
        bf16=least("bf16"),
        fp32=least("fp32"),
        link_bandwidth=least("link_bandwidth"),
    )
    return replace(
        weakest,
        gpu=gpu,
        count=sum(group.count for group in groups),
        others=tuple(process for group in groups for process in group.others),
        indices=tuple(index for group in groups for index in group.indices),
    )


# --- the next larger ------------------------------------------------------------------------


def next_larger(gpus: Gpus) -> Gpu | None:
    """The card of the catalogue with the least memory above this one's, of the same vendor; of
    several the latest. None: there is none."""
    room = gpus.gpu.capacity if gpus.free is None else gpus.free
    vendor = "nvidia" if gpus.nominal else gpus.gpu.vendor
    larger = [gpu for gpu in all_gpus() if gpu.vendor == vendor and notably(gpu.capacity, room)]
    return min(larger, key=lambda gpu: (_sold(gpu), -(gpu.year or 0)), default=None)


def notably(size: int, than: int) -> bool:
    """More by a tenth: cards of one size as sold differ by less."""
    return size * 10 > than * 11


def _sold(gpu: Gpu) -> int:
    """GiB as sold: drivers report somewhat less of each."""
    return -(-gpu.memory // 2**30)


def by_memory(gpus: Iterable[Gpu]) -> list[Gpu]:
    """The smallest first."""
    return sorted(gpus, key=lambda gpu: (gpu.capacity, gpu.id))


def smallest_with(required: int, vendor: str = "nvidia") -> Gpu | None:
    """The smallest card of the catalogue that has `required` bytes; None: none has."""
    enough = [g for g in all_gpus() if g.vendor == vendor and g.capacity >= required]
    return by_memory(enough)[0] if enough else None
