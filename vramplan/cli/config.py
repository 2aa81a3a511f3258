"""`vramplan config MODEL --out DIR`: DeepSpeed's and accelerate's configs from a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli.asked import Asked, command_about_a_run

if TYPE_CHECKING:
    from vramplan_launcher.deepspeed_config import Config, Hyperparameters

    from vramplan.hardware.gpu import Gpus
    from vramplan.models.architecture import Architecture
    from vramplan.recipe.recipe import Recipe


@command_about_a_run(
    "config",
    click.option("--out", metavar="DIR", required=True, help="Where the files go."),
    click.option("--force", is_flag=True, help="Overwrite files that are there."),
    click.option("--hf-auto", is_flag=True, help='"auto" where transformers fills in the same.'),
    click.option("--machines", type=int, default=1, help="Of accelerate's config. [1]"),
    click.option("--learning-rate", type=float, help="TrainingArguments' too. [5e-5]"),
    click.option("--weight-decay", type=float, help="TrainingArguments' too. [0]"),
    click.option("--max-grad-norm", type=float, help="TrainingArguments' too. [1]"),
    importing=True,
)
def command(
    ctx: click.Context,
    asked: Asked,
    *,
    out: str,
    force: bool,
    hf_auto: bool,
    machines: int,
    **hyper: float | None,
) -> None:
    """Write ds_config.json for fine-tuning MODEL, and what is used with it.

    With --gpu, ZeRO's buffers are sized for the memory that the run leaves. Beside it go
    accelerate_config.yaml, training_arguments.py, and REASONS.md: why each value is as it is.

    Exit code: 0 if it fits or no GPU is named, 1 if it does not fit, 2 if the input is wrong.
    """
    from vramplan_launcher.deepspeed_config import ds_config
    from vramplan_launcher.deepspeed_files import contents

    gpus = asked.named_gpus()
    recipe = _over(asked, gpus)
    name, arch = _model(asked)
    params = _hyper(asked, hyper)
    config = ds_config(arch, recipe, gpus=gpus, hf_auto=hf_auto, hyper=params)
    folder = Path(out)
    texts = contents(config, params, folder, machines=machines, title=f"DeepSpeed for {name}")
    _write(folder, texts, force=force)
    fits = None if config.required is None else config.required <= (config.available or 0)
    click.echo(
        _json(config, folder, texts, fits) if asked.as_json else _text(config, folder, texts)
    )
    ctx.exit(1 if fits is False else 0)


def _over(asked: Asked, gpus: Gpus | None) -> Recipe:
    """All the cards that were named train together; a recipe's own number stays."""
    recipe = asked.recipe()
    if gpus is None or recipe.world_size != 1 or asked.fields["world_size"] is not None:
        return recipe
    return replace(recipe, world_size=gpus.count)


def _model(asked: Asked) -> tuple[str, Architecture]:
    from vramplan.memory.estimate import resolve
    from vramplan.models.hf_config import architecture

    if asked.offline:
        located = asked.located()
        return located.id, architecture(located.config)
    name, arch, _ = resolve(asked.model)
    return name, arch


def _hyper(asked: Asked, given: dict[str, float | None]) -> Hyperparameters:
    """Those of the options, else of the files that were given, else TrainingArguments' defaults."""
    from vramplan_launcher.deepspeed_config import Hyperparameters

    found: dict[str, Any] = {}
    if asked.imported is not None and asked.imported.options.learning_rate is not None:
        found["learning_rate"] = asked.imported.options.learning_rate
    if asked.fields.get("deepspeed") is not None:
        from vramplan.recipe.ds_config import read_ds_config

        found |= read_ds_config(asked.fields["deepspeed"]).hyper
    return Hyperparameters(**{**found, **{k: v for k, v in given.items() if v is not None}})


def _write(folder: Path, texts: dict[str, str], *, force: bool) -> None:
    """All of the files, or none: nothing is overwritten unasked."""
    from vramplan_launcher.files import write_text

    from vramplan.errors import UserError

    there = [name for name in texts if (folder / name).exists()]
    if there and not force:
        raise UserError(
            f"{str(folder)!r} holds {', '.join(there)} already: name another folder, or overwrite "
            "with --force"
        )
    for name, text in texts.items():
        write_text(folder / name, text)


def _json(config: Config, folder: Path, texts: dict[str, str], fits: bool | None) -> str:
    import json

    document = {
        "schema": 1,
        "files": [str(folder / name) for name in texts],
        "ds_config": config.values,
        "reasons": config.reasons,
        "recipe": config.recipe.to_dict(),
        "required": config.required,
        "available": config.available,
        "fits": fits,
    }
    return json.dumps(document, indent=2)


def _text(config: Config, folder: Path, texts: dict[str, str]) -> str:
    from textwrap import wrap

    from vramplan_launcher.deepspeed_files import value_of

    from vramplan.cli.terminal import look
    from vramplan.units import format_bytes

    width = look().width
    lines: list[str] = []
    for key, reason in config.reasons.items():
        lines.append(f"{key}: {value_of(config, key)}")
        lines += wrap(reason, width, initial_indent="    ", subsequent_indent="    ")
    lines.append("")
    if config.required is not None and config.available is not None:
        verdict = "fits" if config.required <= config.available else "does NOT fit"
        lines.append(
            f"{verdict}: {format_bytes(config.required)} of {format_bytes(config.available)}"
        )
    lines += ["Written:", *(f"  {folder / name}" for name in texts)]
    return "\n".join(lines)
