"""`vramplan estimate MODEL`: how much GPU memory a run needs, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vramplan.cli.asked import Asked, command_about_a_run, named
from vramplan.cli.shown import shown_json, shown_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.errors import UserError
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.advice import Change
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.recipe import Recipe

_MODES = ("training", "inference")
_VIAS = ("rules", "trace")


@command_about_a_run(
    "estimate",
    click.option(
        "--mode", metavar="NAME", default="training", help="training or inference. [training]"
    ),
    click.option(
        "--prompt", metavar="N", help="Of inference: the prompt's part of --seq-len. [all]"
    ),
    click.option("--advice", is_flag=True, help="Show what would help even if it fits."),
    click.option("--explain", is_flag=True, help="Every term, with its formula and figures."),
    click.option("--compare-zero", is_flag=True, help="Show DDP and each ZeRO stage side by side."),
    click.option("--via", metavar="NAME", default="rules", help="rules or trace (slow). [rules]"),
    cards="what is in this machine",
    trusting="Of --via trace: run a folder's own code.",
    importing=True,
)
def command(
    ctx: click.Context,
    asked: Asked,
    *,
    mode: str,
    prompt: str | None,
    advice: bool,
    explain: bool,
    compare_zero: bool,
    via: str,
) -> None:
    """Say how much GPU memory fine-tuning MODEL needs, and whether it fits.

    MODEL is a Hugging Face id (meta-llama/Llama-3.1-8B), a folder, or a config.json.

    Exit code: 0 if it fits or no GPU is known, 1 if it does not fit, 2 if the input is wrong.
    """
    with _NoCollections():
        flags = {"advice": advice, "explain": explain, "compare-zero": compare_zero}
        _check_mode(mode, asked, {**flags, "prompt": prompt})
        _check_via(via, mode, flags, asked.trust_remote_code)
        recipe = asked.recipe()
        gpus, no_gpu = _gpus(asked, recipe)
        if asked.card is not None and gpus is not None and compare_zero:
            recipe = asked.over_all(recipe, gpus.count)
        _check_way_of(recipe, via)
        if mode == "inference":
            from vramplan.cli import inference

            fits = inference.answer(asked, recipe, prompt, gpus, no_gpu)
        elif via == "trace":
            from vramplan.cli.trace import traced

            found = traced(asked, recipe, gpus)
            click.echo(shown_json(found) if asked.as_json else shown_text(found, no_gpu))
            fits = found.fits
        else:
            shows = {"advice": advice, "explain": explain, "compare_zero": compare_zero}
            fits = _answer(asked, recipe, gpus, no_gpu, **shows)
    ctx.exit(1 if fits is False else 0)


def _answer(
    asked: Asked,
    recipe: Recipe,
    gpus: Gpus | None,
    no_gpu: str,
    *,
    advice: bool,
    explain: bool,
    compare_zero: bool,
) -> bool | None:
    """Prints the estimate by rules; whether it fits."""
    needed = _estimate(asked, recipe, gpus)
    if compare_zero:
        from vramplan.cli.shown import shown_ways

        click.echo(shown_ways(needed, as_json=asked.as_json))
        return needed.fits
    wanted = advice or (needed.fits is False and not asked.as_json)
    changes, combination = _advice(needed) if wanted else (None, None)
    if asked.as_json:
        shown = shown_json(needed, changes=changes, combination=combination, explaining=explain)
    else:
        shown = shown_text(
            needed,
            no_gpu,
            changes=changes,
            combination=combination,
            again=_again(asked),
            explaining=explain,
        )
    click.echo(shown)
    return needed.fits


class _NoCollections:
    """A short process makes few garbage cycles: looking for them costs more than they do."""

    def __enter__(self) -> None:
        import gc

        self._were_on = gc.isenabled()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        import gc

        if self._were_on:
            gc.enable()


def _check_mode(mode: str, asked: Asked, others: dict[str, Any]) -> None:
    """Raises UserError for an unknown mode, or an option that means nothing in it."""
    from vramplan.errors import UnknownName, UserError

    if mode not in _MODES:
        raise UnknownName("mode", mode, _MODES)
    if mode == "training":
        unfit = ["prompt"] if others["prompt"] is not None else []
    else:
        from vramplan.cli.inference import OF_INFERENCE

        unfit = [name for name in ("advice", "explain", "compare-zero") if others[name]]
        unfit += [n for n, v in asked.fields.items() if v is not None and n not in OF_INFERENCE]
    if unfit:
        option = unfit[0].replace("_", "-")
        raise UserError(f"--{option} means nothing with --mode {mode}: leave one of them out")


def _check_via(via: str, mode: str, others: dict[str, bool], trusted: bool) -> None:
    """Raises UserError for an unknown way, or an option that means nothing with it."""
    from vramplan.errors import UnknownName, UserError

    if via not in _VIAS:
        raise UnknownName("way (--via)", via, _VIAS)
    if via == "rules":
        if trusted:
            raise UserError("--trust-remote-code means nothing without --via trace")
        return
    if mode != "training":
        raise UserError(f"--via trace is of training only, not of --mode {mode}")
    for option, wanted in others.items():
        if wanted:
            raise UserError(
                f"--{option} needs the rules, which a trace does without: leave out --{option} "
                "or --via trace"
            )


def _check_way_of(recipe: Recipe, via: str) -> None:
    """Raises UserError for a trace of several ranks, or of DeepSpeed's engine."""
    from vramplan.errors import UserError

    if via == "trace" and recipe.deepspeed is not None:
        raise UserError(
            "--via trace runs the model alone, without DeepSpeed: leave out --zero and --deepspeed"
        )
    if via == "trace" and recipe.world_size > 1:
        raise UserError("--via trace runs the model alone, without DDP: leave out --world-size")


def _offered(error: UserError) -> UserError:
    """What can be done about an architecture that is not described."""
    from importlib.util import find_spec

    from vramplan.models.hf_config import UnknownArchitecture

    if find_spec("torch") and find_spec("transformers"):
        offer = "Or add --via trace: its own code is then run on fake tensors, without a GPU."
    else:
        offer = (
            "Or pip install 'vramplan[launch]', and add --via trace: its own code is then run on "
            "fake tensors, without a GPU."
        )
    return UnknownArchitecture(f"{error} {offer}")


def _gpus(asked: Asked, recipe: Recipe) -> tuple[Gpus | None, str]:
    """The cards named, or those of this machine; or none, and why."""
    if asked.card is not None:
        return asked.named_gpus(), ""
    from vramplan.hardware.nvml import gpus_here

    found, reason = gpus_here()
    if not found:
        return None, reason
    from vramplan.hardware.uneven import smallest_of

    # One rank takes the card that has most room; of several, the last chosen one decides.
    return smallest_of(found, recipe.world_size), reason


def _estimate(asked: Asked, recipe: Recipe, gpus: Gpus | None) -> Estimate:
    from vramplan.memory.estimate import estimate
    from vramplan.models.hf_config import UnknownArchitecture

    try:
        if not asked.offline:
            return estimate(asked.model, recipe, gpus)
        located = asked.located()
        return named(estimate(located.config, recipe, gpus), located)
    except UnknownArchitecture as error:
        raise _offered(error) from None


def _advice(needed: Estimate) -> tuple[Sequence[Change], Change | None]:
    from vramplan.memory.advice import advise, combine

    return advise(needed), combine(needed)


def _again(asked: Asked) -> tuple[str, ...]:
    """What of the command line another recipe leaves as it is."""
    words = ["vramplan", "estimate", asked.model]
    if asked.card is not None:
        words += ["--gpu", asked.card]
    return (*words, "--offline") if asked.offline else tuple(words)
