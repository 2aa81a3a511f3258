"""One run by DDP and by each stage of ZeRO, side by side: memory of a rank and of its host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.errors import UserError
from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.memory.host import Host
    from vramplan.reports.text import Look

OFFLOADS: tuple[tuple[int, str | None, str | None, str], ...] = (
    (0, None, None, "ZeRO 0"),
    (1, None, None, "ZeRO 1"),
    (2, None, None, "ZeRO 2"),
    (3, None, None, "ZeRO 3"),
    (1, "cpu", None, "ZeRO 1, optimizer on CPU"),
    (2, "cpu", None, "ZeRO 2, optimizer on CPU"),
    (3, "cpu", None, "ZeRO 3, optimizer on CPU"),
    (3, "cpu", "cpu", "ZeRO 3, all on CPU"),
    (3, "nvme", "nvme", "ZeRO 3, all on NVMe"),
)
"""Stage, where the optimizer is, where the weights are, and the name."""
NVME = "/nvme"
"""A path for the comparison, where the recipe has none: memory is the same for all."""


class Way(NamedTuple):
    """One way of training on the same cards."""

    name: str
    deepspeed: DeepSpeed | None
    needed: Estimate | None
    refused: str = ""
    """Why the libraries refuse it; then nothing is estimated."""

    @property
    def host(self) -> Host | None:
        found = self.needed.sharded if self.needed is not None else None
        return found.host if found is not None else None


def ways_of(needed: Estimate) -> tuple[Way, ...]:
    """DDP and the stages for the run that `needed` is of: all else as its recipe says."""
    base = needed.recipe.deepspeed or DeepSpeed()
    first = "DDP" if needed.recipe.world_size > 1 else "no DeepSpeed"
    ways = [_way(needed, first, None)]
    for stage, optimizer, param, name in OFFLOADS:
        fields = {"stage": stage, "offload_optimizer": optimizer, "offload_param": param}
        path = base.nvme_path or (NVME if optimizer == "nvme" else None)
        zero = DeepSpeed.from_dict({**base.to_dict(), **fields, "nvme_path": path})
        ways.append(_way(needed, name, zero))
    return tuple(ways)


def _way(needed: Estimate, name: str, zero: DeepSpeed | None) -> Way:
    try:
        recipe = replace(needed.recipe, deepspeed=zero)
        return Way(name, zero, estimate(needed.architecture, recipe, needed.gpu))
    except UserError as error:
        return Way(name, zero, None, str(error))


def ranks_of_a_node(needed: Estimate) -> int:
    """Ranks that share a host: as many as there are cards of --gpu, or all."""
    ranks = needed.recipe.world_size
    return ranks if needed.gpu is None else min(ranks, needed.gpu.count)


def ways_to_dict(needed: Estimate, ways: Sequence[Way]) -> dict[str, Any]:
    """Plain data, as `vramplan estimate --compare-zero --json` prints it."""
    ranks = ranks_of_a_node(needed)
    return {
        "schema": 1,
        "model": needed.to_dict()["model"],
        "recipe": needed.recipe.to_dict(),
        "gpu": None if needed.gpu is None else needed.gpu.to_dict(),
        "ranks_of_a_node": ranks,
        "ways": [_to_dict(way, ranks) for way in ways],
    }


def _to_dict(way: Way, ranks: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": way.name,
        "deepspeed": None if way.deepspeed is None else way.deepspeed.to_dict(),
        "refused": way.refused or None,
    }
    if way.needed is None:
        return out
    host = way.host
    return {
        **out,
        "peak_allocated": way.needed.peak_allocated,
        "peak_phase": way.needed.peak_phase,
        "required": way.needed.required,
        "fits": way.needed.fits,
        "host": None if host is None else host._asdict(),
        "node": None if host is None else {k: ranks * v for k, v in host._asdict().items()},
    }


def show_ways(needed: Estimate, ways: Sequence[Way], look: Look) -> str:
    """A table: what a rank needs of its GPU, and what a node's ranks keep in its memory."""
    ranks, node = needed.recipe.world_size, ranks_of_a_node(needed)
    each = f"each of {ranks} ranks" if ranks > 1 else "one GPU"
    lines = [look.paint(f"{needed.id}, {each}:", "heading"), ""]
    title = f"host x {node}" if node > 1 else "host"
    head = f"  {'':<26}{'peak':>10}{'required':>11}  {'fits':<4}{title:>13}"
    lines.append(head + (f"{'NVMe':>12}" if _any_nvme(ways) else ""))
    lines += [_row(way, node, look) for way in ways]
    lines += _refusals(ways, look)
    lines.append("")
    lines += _notes(needed, node, look)
    return "\n".join(lines)


def _row(way: Way, node: int, look: Look) -> str:
    if way.needed is None:
        return f"  {way.name:<26}{'refused':>10}"
    found = way.needed
    fits = "" if found.fits is None else "yes" if found.fits else "no"
    role = "good" if found.fits else "bad"
    painted = look.paint(f"{fits:<4}", role) if fits else f"{fits:<4}"
    row = (
        f"  {way.name:<26}{format_bytes(found.peak_allocated):>10}"
        f"{format_bytes(found.required):>11}  {painted}"
    )
    host = way.host
    if host is None or not (host.pinned or host.pageable or host.nvme):
        return row.rstrip()
    row += f"{format_bytes(node * (host.pinned + host.pageable)):>13}"
    return row + (f"{format_bytes(node * host.nvme):>12}" if host.nvme else "")


def _any_nvme(ways: Sequence[Way]) -> bool:
    return any(way.host is not None and way.host.nvme for way in ways)


def _refusals(ways: Sequence[Way], look: Look) -> Iterator[str]:
    from vramplan.reports.text import wrap

    for reason in dict.fromkeys(way.refused for way in ways if way.refused):
        names = ", ".join(way.name for way in ways if way.refused == reason)
        yield ""
        yield from wrap(f"Refused ({names}): {reason}.", look.width)


def _notes(needed: Estimate, node: int, look: Look) -> Iterator[str]:
    from vramplan.reports.text import wrap

    what = "the node's ranks together" if node > 1 else "the process"
    yield from wrap(
        "peak: allocated by torch, of the rank that needs most; required: with the CUDA context, "
        f"NCCL and the allocator's slack; host: pinned and pageable memory of {what}, beyond "
        "what Python and the libraries take.",
        look.width,
    )
    if needed.gpu is None:
        yield from wrap("For verdicts, name the cards: --gpu 8xH100-80GB.", look.width)
