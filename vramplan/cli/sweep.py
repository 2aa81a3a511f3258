"""`vramplan sweep MODEL --over NAME=A,B`: one table over values of a recipe's fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.sweep_launch import LAUNCH_OPTIONS, check_launch

if TYPE_CHECKING:
    from vramplan.planner.sweep import Sweep


@command_about_a_run(
    "sweep",
    click.option(
        "--over",
        metavar="NAME=A,B,...",
        multiple=True,
        help="lora-rank=8,128, seq=1k,4k, ...; repeatable.",
    ),
    click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of text."),
    click.option("--plot", metavar="FILE", help="Draw it: .png or .svg. Needs vramplan[plot]."),
    *LAUNCH_OPTIONS,
    cards="what is in this machine",
)
def command(
    ctx: click.Context,
    asked: Asked,
    *,
    over: tuple[str, ...],
    as_csv: bool,
    plot: str | None,
    launch: bool,
    random_weights: bool,
) -> None:
    """Estimate MODEL with every combination of the values of --over.

    Exit code: 0 if one of them fits or no GPU is known, 1 if none does, 2 if the input is wrong.
    """
    from vramplan.errors import UserError

    check_launch(launch, random_weights)
    if as_csv and asked.as_json:
        raise UserError("--csv and --json are both what to print: leave one of them out")
    if plot is not None:
        from vramplan.reports.plot import check, draw

        check(Path(plot))  # before anything runs
    found = _swept(asked, over)
    if launch:
        from vramplan.cli.sweep_launch import measured_sweep

        found = measured_sweep(found, asked, random_weights=random_weights)
    if plot is not None:
        draw(found, Path(plot))
    if asked.as_json:
        import json

        click.echo(json.dumps(found.to_dict(), indent=2))
    elif as_csv:
        click.echo(found.to_csv(), nl=False)
    else:
        from vramplan.cli.terminal import look
        from vramplan.reports.sweep import show

        click.echo(show(found, look()))
    fits = [row.fits for row in found.rows]
    ctx.exit(0 if found.gpus is None or any(fits) else 1)


def _swept(asked: Asked, over: tuple[str, ...]) -> Sweep:
    from dataclasses import replace

    from vramplan.cli.ladder import _gpus
    from vramplan.errors import UserError
    from vramplan.planner.sweep import parse_over, sweep

    if not over:
        raise UserError("nothing to sweep over: add --over seq=1024,4096 or the like")
    values = {}
    for text in over:
        name, found = parse_over(text)
        if name in values:
            raise UserError(f"--over {name} is given twice: list its values in one")
        values[name] = found
    located = asked.located() if asked.offline else None
    recipe, cards = asked.recipe(), asked.named_gpus()
    if cards is not None and "zero" in values and "world_size" not in values:
        recipe = asked.over_all(recipe, cards.count)  # a row without ZeRO is DDP
    swept = sweep(located.config if located else asked.model, recipe, values, _gpus(asked))
    return swept if located is None else replace(swept, id=located.id)
