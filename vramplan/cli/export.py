"""`vramplan export MODEL --to …`: the run as another tool's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vramplan.cli.asked import Asked, command_about_a_run

if TYPE_CHECKING:
    from vramplan.recipe.exchange.result import Imported, Options
    from vramplan.recipe.recipe import Recipe

DS_CONFIG = "ds_config.json"


@command_about_a_run(
    "export",
    click.option(
        "--to",
        "target",
        metavar="NAME",
        required=True,
        help="training-arguments, trl, accelerate, axolotl or llama-factory.",
    ),
    click.option("--out", metavar="FILE", help="Where it goes. [printed]"),
    click.option("--force", is_flag=True, help="Overwrite a file that is there."),
    click.option("--data", metavar="PATH", help="A file or a dataset's id, as the tool takes it."),
    click.option("--learning-rate", type=float, help="[2e-4 with LoRA, else 2e-5]"),
    click.option("--epochs", type=float, help="[1]"),
    click.option("--max-steps", type=int, help="Instead of --epochs."),
    click.option("--output", metavar="DIR", help="The folder that the run writes to. [outputs]"),
    click.option("--seed", type=int, help="[the tool's]"),
    importing=True,
)
def command(
    ctx: click.Context,
    asked: Asked,
    *,
    target: str,
    out: str | None,
    force: bool,
    **training: float | str | None,
) -> None:
    """Write the run for another tool: a Python script, or a YAML.

    MODEL is a model as `vramplan estimate` takes it, or a plan.json. With --from, another tool's
    file is turned into that of a third.

    What the tool does otherwise than the run that is estimated is said on stderr, and in the file.
    With DeepSpeed and --out, ds_config.json is written beside it.
    """
    from vramplan.errors import UserError
    from vramplan.recipe.exchange import export

    if asked.as_json and out is not None:
        raise UserError("--json prints the file: leave out --out")
    asked = _planned(asked)
    if asked.imported is None:
        _check_path(asked)
    recipe = asked.recipe()
    options = _options(asked.imported, training)
    folder = None if out is None else Path(out).parent
    ds_config = DS_CONFIG if folder is None else (folder / DS_CONFIG).as_posix()
    made = export(target, asked.model, recipe, options, ds_config=ds_config)
    if asked.as_json:
        click.echo(json.dumps({"text": made.text, "notes": list(made.notes)}, indent=2))
        return
    for note in made.notes:
        click.echo(f"Note: {note}.", err=True)
    if out is None or folder is None:
        click.echo(made.text, nl=False)
        if recipe.deepspeed is not None:
            click.echo(f"Note: {DS_CONFIG} is written with --out.", err=True)
        return
    files = {Path(out): made.text}
    if recipe.deepspeed is not None:
        text = _ds_config(asked, recipe, options)
        if _differs(folder / DS_CONFIG, text):  # one file serves several tools
            files[folder / DS_CONFIG] = text
    _write(files, force=force)


def _planned(asked: Asked) -> Asked:
    """A plan.json in MODEL's place: its model, and its recipe under the options."""
    if not asked.model.endswith(".json") or asked.imported is not None:
        return asked
    from vramplan.errors import UserError
    from vramplan.recipe.exchange import read_any

    path = Path(asked.model)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return asked  # a config.json, or nothing at all: said where the model is looked for
    if not isinstance(document, dict) or "recipe" not in document:
        return asked
    plan = read_any(path)
    if plan.model is None:
        raise UserError(f"{asked.model!r} names no model")
    return asked._replace(model=plan.model, imported=plan)


def _check_path(asked: Asked) -> None:
    """Raises ModelNotFound or ConfigError for a file or folder that is none; an id may be any."""
    from vramplan.models.locate import is_a_path

    if is_a_path(asked.model):
        asked.located()


def _options(imported: Imported | None, given: dict[str, float | str | None]) -> Options:
    from dataclasses import asdict

    from vramplan.recipe.exchange.result import Options

    base = {} if imported is None else asdict(imported.options)
    return Options(**{**base, **{k: v for k, v in given.items() if v is not None}})


def _ds_config(asked: Asked, recipe: Recipe, options: Options) -> str:
    """Of the same learning rate as the file beside it: Trainer refuses another."""
    from vramplan.memory.estimate import resolve
    from vramplan.models.hf_config import architecture
    from vramplan.recipe.exchange.write_yaml import RATES

    arch = architecture(asked.located().config) if asked.offline else resolve(asked.model)[1]
    from vramplan_launcher.deepspeed_config import Hyperparameters, ds_config

    rate = options.learning_rate or RATES["full" if recipe.lora is None else "lora"]
    config = ds_config(arch, recipe, hyper=Hyperparameters(learning_rate=rate))
    return json.dumps(config.values, indent=2) + "\n"


def _differs(path: Path, text: str) -> bool:
    """Whether writing would change what is there."""
    try:
        return path.read_text(encoding="utf-8") != text
    except (OSError, ValueError):
        return True


def _write(files: dict[Path, str], *, force: bool) -> None:
    from vramplan.errors import UserError

    for path in files:
        if path.exists() and not force:
            raise UserError(f"{str(path)!r} exists already, and is not overwritten without --force")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"can't write {str(path)!r}: {error.strerror}") from error
        click.echo(f"Written: {path}")
