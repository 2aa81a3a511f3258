"""`vramplan gpus [QUERY]`: the known cards, and the ones in this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.hardware.gpu import Gpu, GpuProcess, Gpus


@click.command("gpus")
@click.argument("query", nargs=-1)
@click.option("--here", "here_only", is_flag=True, help="Only the GPUs in this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(query: tuple[str, ...], here_only: bool, as_json: bool) -> None:
    """List the GPUs in this machine, and the ones that --gpu knows by name.

    QUERY keeps, of the known ones, those that hold each of its words in their name, architecture
    or size: `ada 24GB`, `rtx 30`, `amd`.
    """
    from vramplan.errors import UserError

    words = " ".join(query)
    if here_only and words:
        raise UserError(f"--here lists what is in this machine: it takes no QUERY, found {words!r}")
    # Who asks for a name asks about cards to buy or to rent, not about this machine.
    here, reason = _here() if not words else ([], "")
    known = [] if here_only else _known(words)
    if as_json:
        click.echo(_json(here, reason, known, looked=not words))
        return
    if not words:
        _show_here(here, reason)
    if known:
        if not words:
            click.echo()
        _show_known(known)


def _here() -> tuple[list[Gpus], str]:
    from vramplan.hardware.nvml import gpus_here

    return gpus_here()


def _known(words: str) -> list[Gpu]:
    from vramplan.errors import UnknownName
    from vramplan.hardware.catalogue import all_gpus, nearest_gpu, search

    found = search(words)
    if not found:
        ids = [gpu.id for gpu in all_gpus()]
        hint = "`vramplan gpus` lists them"
        raise UnknownName("GPU", words, ids, hint=hint, closest=nearest_gpu(words))
    return found


def _json(here: Sequence[Gpus], reason: str, known: Sequence[Gpu], *, looked: bool) -> str:
    import json

    from vramplan.hardware.gpu import Gpus

    document: dict[str, Any] = {"schema": 1}
    if looked:
        document |= {"here": [gpus.to_dict() for gpus in here], "here_reason": reason or None}
    if known:
        machine = ("count", "nominal", "free", "others", "indices")
        cards = (Gpus(gpu=gpu).to_dict() for gpu in known)
        document["gpus"] = [
            {key: value for key, value in card.items() if key not in machine} for card in cards
        ]
    return json.dumps(document, indent=2)


def _show_here(here: Sequence[Gpus], reason: str) -> None:
    from vramplan.units import format_bytes

    if reason:
        click.echo(reason)
    for gpus in here:
        each = " each" if gpus.count > 1 else ""
        assert gpus.free is not None
        free = f"{format_bytes(gpus.free)} of {format_bytes(gpus.gpu.capacity)} free{each}"
        click.echo(f"In this machine: {gpus}, {free}")
        for process in gpus.others:
            click.echo(f"  in use by process {process.pid}: {_used(process)}")


def _used(process: GpuProcess) -> str:
    from vramplan.units import format_bytes

    return "an unknown amount" if process.used is None else format_bytes(process.used)


def _show_known(known: Sequence[Gpu]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)
    for header in ("GiB", "GB/s", "fp16", "fp32"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("bf16", "FA2", "link"):
        table.add_column(header, no_wrap=True)
    for gpu in known:
        table.add_row(*_row(gpu))
    Console(highlight=False).print(table)
    click.echo("\n" + _legend(known))


def _row(gpu: Gpu) -> tuple[str, ...]:
    from vramplan.units import GIB

    return (
        gpu.id,
        f"{'' if gpu.memory_is_reported else '~'}{gpu.memory / GIB:.1f}",
        _rate(gpu.bandwidth, 10**9),
        _rate(gpu.fp16, 10**12),
        _rate(gpu.fp32, 10**12),
        "yes" if gpu.supports_bf16 else "no",
        "yes" if gpu.supports_flash_attention_2 else "no",
        gpu.link.partition(",")[0],
    )


def _rate(value: int | None, unit: int) -> str:
    if value is None:
        return "-"
    return f"{value / unit:.0f}" if value >= 100 * unit else f"{value / unit:g}"


def _legend(known: Sequence[Gpu]) -> str:
    lines = [
        "GiB: what the driver reports. fp16, fp32: dense TFLOPS, fp16 with fp32 sums.",
        "bf16: in hardware. FA2: flash_attention_2.",
    ]
    if not all(gpu.memory_is_reported for gpu in known):
        lines.append("~ the size as sold: no driver's figure is known.")
    if any(gpu.fp16 is None for gpu in known):
        lines.append("- no rate that sources agree on.")
    return "\n".join(lines)
