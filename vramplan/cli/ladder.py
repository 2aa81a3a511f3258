"""`vramplan ladder MODEL`: each saving in turn, and the checklist by impact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.sweep_launch import LAUNCH_OPTIONS, check_launch

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus


_START = {
    "dtype": "fp32",
    "attention": "eager",
    "optimizer": "adamw_torch",
    "allocator": "default",
}


@command_about_a_run("ladder", *LAUNCH_OPTIONS, cards="what is in this machine", defaults=_START)
def command(ctx: click.Context, asked: Asked, *, launch: bool, random_weights: bool) -> None:
    """Show what each way to save memory does for MODEL, one on top of the other.

    It begins with full fine-tuning in fp32 with eager attention, the default allocator and no
    checkpointing, or with what the options say.

    Exit code: 0 if some rung fits or no GPU is known, 1 if none fits, 2 if the input is wrong.
    """
    from vramplan.planner.ladder import ladder, start_of

    check_launch(launch, random_weights)
    located = asked.located() if asked.offline else None
    found = ladder(
        located.config if located else asked.model, start_of(_given(asked)), _gpus(asked)
    )
    if located is not None:
        from dataclasses import replace

        found = replace(found, id=located.id)
    if launch:
        from vramplan.cli.sweep_launch import measured_ladder

        found = measured_ladder(found, asked, random_weights=random_weights)
    if asked.as_json:
        import json

        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from vramplan.cli.terminal import look
        from vramplan.reports.ladder import show

        click.echo(show(found, look()))
    ctx.exit(1 if all(rung.fits is False for rung in found.rungs) else 0)


def _given(asked: Asked) -> dict[str, Any]:
    """The recipe's fields that were chosen, by options or a file."""
    from vramplan.planner.ladder import START
    from vramplan.recipe.recipe import Recipe

    recipe, open_ = asked.recipe(), Recipe()
    named = {name for name, value in asked.fields.items() if value is not None}
    return {
        name: getattr(recipe, name)
        for name in Recipe.__slots__
        if name in named or name not in START or getattr(recipe, name) != getattr(open_, name)
    }


def _gpus(asked: Asked) -> Gpus | None:
    from vramplan.hardware.nvml import gpus_here

    if asked.card is not None:
        return asked.named_gpus()
    return max(gpus_here()[0], key=lambda gpus: gpus.free or 0, default=None)
