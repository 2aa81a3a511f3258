"""`vramplan trace MODEL`: the model's real code on fake tensors, shown as an estimate is."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, cast

import click

from vramplan.cli.recipe_options import recipe_of, recipe_options

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.recipe import Recipe
    from vramplan.reports.comparison import Comparison

NO_GPU = "No GPU was named."


@click.command(
    "trace", context_settings={"token_normalize_func": lambda name: name.replace("_", "-")}
)
@click.argument("model")
@click.option("--gpu", "card", metavar="TEXT", help="24GB, rtx-4090, ... [none]")
@recipe_options
@click.option("--recipe", "recipe_file", metavar="FILE", help="JSON or TOML; options override it.")
@click.option("--compare", "comparing", is_flag=True, help="Against the estimate, part by part.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python files of a local folder.")
@click.option("--fresh", is_flag=True, help="Trace again, whatever was traced before.")
@click.option("--offline", is_flag=True, help="Ask nothing of the network.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    card: str | None,
    recipe_file: str | None,
    comparing: bool,
    trust_remote_code: bool,
    fresh: bool,
    offline: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Run MODEL's real code on fake tensors, and count what training it allocates.

    It needs no GPU and no memory for weights, but torch, transformers, accelerate and peft:
    pip install 'vramplan[launch]'. It takes seconds, of deep models a minute.

    Exit code: 0 if it fits or no GPU is named, 1 if it does not fit, 2 if the input is wrong.
    """
    recipe = recipe_of(recipe_file, given)
    gpus = parsed(card)
    asked = Asked(model, recipe, gpus, offline, trust_remote_code)
    if comparing:
        found = asked.compare()
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=2))
        else:
            from vramplan.reports.comparison import render

            click.echo(render(found))
        return
    needed = asked.trace(fresh=fresh)
    shown = json.dumps(needed.to_dict(), indent=2) if as_json else text_of(needed, NO_GPU)
    click.echo(shown)
    ctx.exit(1 if needed.fits is False else 0)


def parsed(card: str | None) -> Gpus | None:
    """The cards that were named."""
    if card is None:
        return None
    from vramplan.hardware.catalogue import parse_gpu

    return parse_gpu(card)


class Asked:
    """What is to be traced. Its methods reach for the launcher, and so for torch."""

    def __init__(
        self, model: str, recipe: Recipe, gpus: Gpus | None, offline: bool, trusted: bool
    ) -> None:
        self.model, self.recipe, self.gpus = model, recipe, gpus
        self.offline, self.trusted = offline, trusted

    def trace(self, *, fresh: bool = False) -> Estimate:
        """The trace in the shape of an estimate."""
        from vramplan_launcher.trace.api import trace_model

        with working(f"Tracing {self.model} ..."):
            found = trace_model(
                self.model,
                self.recipe,
                self.gpus,
                offline=self.offline or None,
                trust_remote_code=self.trusted,
                use_cache=not fresh,
            )
        return cast("Estimate", found)

    def compare(self) -> Comparison:
        """Estimate against trace."""
        from vramplan_launcher.trace.compare import compared

        with working(f"Tracing {self.model} ..."):
            return compared(self.model, self.recipe, self.gpus, offline=self.offline or None)


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


def text_of(needed: Estimate, no_gpu: str) -> str:
    """As `vramplan estimate` prints it."""
    from vramplan.cli.terminal import look
    from vramplan.reports.text import show

    return show(needed, no_gpu=no_gpu, look=look())
