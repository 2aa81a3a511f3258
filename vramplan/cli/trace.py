"""`vramplan trace MODEL`: the model's real code on fake tensors, shown as an estimate is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.shown import shown_json, shown_text

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.recipe import Recipe
    from vramplan.reports.comparison import Comparison

NO_GPU = "No GPU was named."


@command_about_a_run(
    "trace",
    click.option("--compare", "comparing", is_flag=True, help="Against the estimate, by part."),
    click.option("--fresh", is_flag=True, help="Trace again, whatever was traced before."),
    importing=True,
)
def command(ctx: click.Context, asked: Asked, *, comparing: bool, fresh: bool) -> None:
    """Run MODEL's real code on fake tensors, and count what training it allocates.

    It needs no GPU and no memory for weights, but torch, transformers, accelerate and peft:
    pip install 'vramplan[launch]'. It takes seconds, of deep models a minute.

    Exit code: 0 if it fits or no GPU is named, 1 if it does not fit, 2 if the input is wrong.
    """
    recipe = asked.recipe()
    if recipe.deepspeed is not None:
        from vramplan.errors import UserError

        raise UserError(
            "a trace runs the model alone, without DeepSpeed: leave out --zero and --deepspeed"
        )
    gpus = asked.named_gpus()
    if comparing:
        found = compared(asked, recipe, gpus)
        if asked.as_json:
            import json

            click.echo(json.dumps(found.to_dict(), indent=2))
        else:
            from vramplan.reports.comparison import render

            click.echo(render(found))
        return
    needed = traced(asked, recipe, gpus, fresh=fresh)
    click.echo(shown_json(needed) if asked.as_json else shown_text(needed, NO_GPU))
    ctx.exit(1 if needed.fits is False else 0)


# These reach for the launcher, and so for torch.


def traced(asked: Asked, recipe: Recipe, gpus: Gpus | None, *, fresh: bool = False) -> Estimate:
    """The trace in the shape of an estimate."""
    from vramplan_launcher.trace.api import trace_model

    with working(f"Tracing {asked.model} ..."):
        found = trace_model(
            asked.model,
            recipe,
            gpus,
            offline=asked.offline or None,
            trust_remote_code=asked.trust_remote_code,
            use_cache=not fresh,
        )
    return cast("Estimate", found)


def compared(asked: Asked, recipe: Recipe, gpus: Gpus | None) -> Comparison:
    """Estimate against trace."""
    from vramplan_launcher.trace.compare import compared as compare

    with working(f"Tracing {asked.model} ..."):
        return compare(asked.model, recipe, gpus, offline=asked.offline or None)


class working:  # noqa: N801  # reads as a statement: with working("Tracing ...")
    """Says on a terminal what takes a while, and takes it back."""

    def __init__(self, what: str) -> None:
        self.what = what if sys.stderr.isatty() else ""

    def __enter__(self) -> None:
        if self.what:
            sys.stderr.write(self.what)
            sys.stderr.flush()

    def __exit__(self, *error: object) -> None:
        if self.what:
            sys.stderr.write(f"\r{' ' * len(self.what)}\r")
            sys.stderr.flush()
