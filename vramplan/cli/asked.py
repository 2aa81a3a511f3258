"""What every command about a run takes: a model, a card, a recipe, and how to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from vramplan.cli.recipe_options import recipe_of, recipe_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.estimate import Estimate
    from vramplan.memory.inference import InferenceEstimate
    from vramplan.models.locate import Located
    from vramplan.recipe.exchange.result import Imported
    from vramplan.recipe.recipe import Recipe

    _E = TypeVar("_E", Estimate, InferenceEstimate)

# --seq_len is --seq-len: fields have underscores.
SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}


class Asked(NamedTuple):
    """The options that the commands share, as they were given."""

    model: str
    card: str | None
    recipe_file: str | None
    trust_remote_code: bool
    offline: bool
    as_json: bool
    fields: dict[str, Any]
    """Of the recipe; None for each that was not given."""
    imported: Imported | None = None
    """What the file of --from says, of the commands that have it."""

    def recipe(self) -> Recipe:
        """The recipe of the file, or the default, with the options that were given.

        DeepSpeed goes over all the cards of --gpu, unless the recipe has a number of its own.
        """
        cards = self.named_gpus()
        base = None if self.imported is None else self.imported.recipe.to_dict()
        count = None if cards is None else cards.count
        recipe = recipe_of(self.recipe_file, self.fields, count, base)
        return recipe if recipe.deepspeed is None else self.over_all(recipe, count)

    def over_all(self, recipe: Recipe, count: int | None) -> Recipe:
        """`recipe` over `count` cards, if neither it nor --world-size says a number."""
        if count is None or recipe.world_size != 1 or self.fields["world_size"] is not None:
            return recipe
        from dataclasses import replace

        return replace(recipe, world_size=count)

    def named_gpus(self) -> Gpus | None:
        """The cards of --gpu."""
        if self.card is None:
            return None
        from vramplan.hardware.uneven import parse_cards

        return parse_cards(self.card)

    def located(self) -> Located:
        """The model's config, from this machine alone."""
        from vramplan.models.locate import locate

        return locate(self.model, offline=True)


def named(needed: _E, located: Located) -> _E:
    """An estimate of a config under the name by which the config was found."""
    from dataclasses import replace

    return replace(needed, id=located.id, notes=(located.note,) if located.note else ())


_IMPORTING = (
    click.option(
        "--from",
        "source",
        metavar="FILE",
        help="Of Axolotl, LLaMA-Factory, TRL, Trainer, DeepSpeed; options override it.",
    ),
    click.option(
        "-v", "--verbose", is_flag=True, help="With --from: also name what costs no memory."
    ),
)


def command_about_a_run(
    name: str,
    *own: Callable[[Any], Any],
    cards: str = "none",
    trusting: str = "Run the Python files of a local folder.",
    importing: bool = False,
    defaults: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], click.Command]:
    """A command `name` with the shared options, and its `own` between the recipe and the output.

    Its callback gets the context, an Asked, and a keyword argument for each of its own options.
    `cards` says in the help what counts without --gpu, `trusting` what --trust-remote-code does.
    With `importing` it takes --from too: another tool's file, which may name the model. `defaults`
    is what its help says instead of [the default] of a recipe's fields; nothing for "".
    """
    options: tuple[Callable[[Any], Any], ...] = (
        click.argument("model", required=not importing),
        click.option("--gpu", "card", metavar="TEXT", help=f"24GB, rtx-4090, ... [{cards}]"),
        recipe_options,
        click.option(
            "--recipe", "recipe_file", metavar="FILE", help="JSON or TOML; options override it."
        ),
        *(_IMPORTING if importing else ()),
        *own,
        click.option("--trust-remote-code", is_flag=True, help=trusting),
        click.option("--offline", is_flag=True, help="Ask nothing of the network."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    )

    def decorate(function: Callable[..., None]) -> click.Command:
        own_names = _names_of(own)

        def callback(**given: Any) -> None:
            mine = {n: given.pop(n) for n in own_names}
            shared = {n: given.pop(n) for n in Asked._fields if n not in ("fields", "imported")}
            source, verbose = given.pop("source", None), given.pop("verbose", False)
            asked = Asked(**shared, fields=given)
            if importing:
                asked = _with_import(asked, source, verbose=verbose)
            function(click.get_current_context(), asked, **mine)

        callback.__doc__ = function.__doc__
        for option in reversed(options):
            option(callback)
        command = click.command(name, context_settings=SETTINGS)(callback)
        _say_defaults(command, defaults or {})
        return command

    return decorate


def _say_defaults(command: click.Command, defaults: Mapping[str, str]) -> None:
    for option in command.params:
        if isinstance(option, click.Option) and option.name in defaults:
            text = (option.help or "").rpartition(" [")[0]
            said = defaults[option.name]
            option.help = f"{text} [{said}]" if said else text


def _with_import(asked: Asked, source: str | None, *, verbose: bool) -> Asked:
    """What was asked for, over what the file of --from says; its warnings go to stderr."""
    if source is None:
        if not asked.model:
            raise click.UsageError("Missing argument 'MODEL'.")
        return asked
    from vramplan.errors import UserError
    from vramplan.recipe.exchange import read_any

    if asked.recipe_file is not None:
        raise UserError("--from and --recipe are both a run's recipe: leave one of them out")
    imported = read_any(source)
    for warning in imported.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if verbose and imported.quiet:
        click.echo(f"Passed over, as it costs no memory: {', '.join(imported.quiet)}", err=True)
    model = asked.model or imported.model
    if model is None:
        raise UserError(f"{source!r} names no model: name it before the options")
    return asked._replace(model=model, imported=imported)


def _names_of(options: tuple[Callable[[Any], Any], ...]) -> list[str]:
    """The keyword arguments that click's `options` make."""

    def nothing() -> None: ...

    for option in options:
        option(nothing)
    parameters: list[click.Parameter] = getattr(nothing, "__click_params__", [])
    return [p.name for p in parameters if p.name]
