"""`vramplan estimate MODEL`: how much GPU memory a run needs, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from vramplan.cli.recipe_options import recipe_of, recipe_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.errors import UserError
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.advice import Change
    from vramplan.memory.estimate import Estimate
    from vramplan.memory.inference import InferenceEstimate
    from vramplan.models.locate import Located
    from vramplan.recipe.recipe import Recipe

    _E = TypeVar("_E", Estimate, InferenceEstimate)

_MODES = ("training", "inference")
_VIAS = ("rules", "trace")
# What of a recipe counts when nothing is trained.
_OF_INFERENCE = ("dtype", "quantization", "double_quant", "attention", "batch_size", "seq_len")


@click.command(
    "estimate", context_settings={"token_normalize_func": lambda name: name.replace("_", "-")}
)
@click.argument("model")
@click.option("--gpu", "card", metavar="TEXT", help="24GB, rtx-4090, ... [what is in this machine]")
@recipe_options
@click.option("--recipe", "recipe_file", metavar="FILE", help="JSON or TOML; options override it.")
@click.option(
    "--mode", metavar="NAME", default="training", help="training or inference. [training]"
)
@click.option("--prompt", metavar="N", help="Of inference: the prompt's part of --seq-len. [all]")
@click.option("--advice", is_flag=True, help="Show what would help even if it fits.")
@click.option("--explain", is_flag=True, help="Every term, with its formula and figures.")
@click.option("--via", metavar="NAME", default="rules", help="rules or trace (slow). [rules]")
@click.option("--trust-remote-code", is_flag=True, help="Of --via trace: run a folder's own code.")
@click.option("--offline", is_flag=True, help="Ask nothing of the network.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    card: str | None,
    recipe_file: str | None,
    mode: str,
    prompt: str | None,
    advice: bool,
    explain: bool,
    via: str,
    trust_remote_code: bool,
    offline: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Say how much GPU memory fine-tuning MODEL needs, and whether it fits.

    MODEL is a Hugging Face id (meta-llama/Llama-3.1-8B), a folder, or a config.json.

    Exit code: 0 if it fits or no GPU is known, 1 if it does not fit, 2 if the input is wrong.
    """
    with _NoCollections():
        _check_mode(mode, given, {"advice": advice, "explain": explain, "prompt": prompt})
        _check_via(via, mode, {"advice": advice, "explain": explain}, trust_remote_code)
        recipe = recipe_of(recipe_file, given)
        gpus, no_gpu = _gpus(card)
        if card is not None and given["world_size"] is None:
            recipe = _over(recipe, gpus)
        _check_way_of(recipe, via)
        if mode == "inference":
            serving = _estimate_inference(model, recipe, prompt, gpus, offline)
            click.echo(_dumped(serving.to_dict()) if as_json else _inference_text(serving, no_gpu))
            fits = serving.fits
        elif via == "trace":
            from vramplan.cli.trace import Asked, text_of

            traced = Asked(model, recipe, gpus, offline, trust_remote_code).trace()
            click.echo(_dumped(traced.to_dict()) if as_json else text_of(traced, no_gpu))
            fits = traced.fits
        else:
            needed = _estimate(model, recipe, gpus, offline)
            fits = needed.fits
            wanted = advice or (fits is False and not as_json)
            changes, combination = _advice(needed) if wanted else (None, None)
            if as_json:
                click.echo(_json(needed, changes, combination, explain))
            else:
                again = _again(model, card, offline)
                click.echo(_text(needed, no_gpu, changes, combination, again))
                if explain:
                    click.echo("\n" + _explanation(needed))
    ctx.exit(1 if fits is False else 0)


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


# --- what was asked -------------------------------------------------------------------------


def _check_mode(mode: str, given: dict[str, Any], others: dict[str, Any]) -> None:
    """Raises UserError for an unknown mode, or an option that means nothing in it."""
    from vramplan.errors import UnknownName, UserError

    if mode not in _MODES:
        raise UnknownName("mode", mode, _MODES)
    if mode == "training":
        unfit = ["prompt"] if others["prompt"] is not None else []
    else:
        unfit = [name for name in ("advice", "explain") if others[name]]
        unfit += [n for n, value in given.items() if value is not None and n not in _OF_INFERENCE]
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


def _over(recipe: Recipe, gpus: Gpus | None) -> Recipe:
    """ZeRO over all the cards that were named; a recipe's own number stays."""
    if recipe.deepspeed is None or recipe.world_size != 1 or gpus is None:
        return recipe
    from dataclasses import replace

    return replace(recipe, world_size=gpus.count)


def _check_way_of(recipe: Recipe, via: str) -> None:
    """Raises UserError for a trace of DeepSpeed's engine."""
    from vramplan.errors import UserError

    if via == "trace" and recipe.deepspeed is not None:
        raise UserError("--via trace runs the model alone, without DeepSpeed: leave out --zero")


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


def _gpus(card: str | None) -> tuple[Gpus | None, str]:
    """The cards named, or those of this machine; or none, and why."""
    if card is not None:
        from vramplan.hardware.catalogue import parse_gpu

        return parse_gpu(card), ""
    from vramplan.hardware.nvml import gpus_here

    found, reason = gpus_here()
    # Of unlike cards, the one that has most room.
    return max(found, key=lambda gpus: gpus.free or 0, default=None), reason


def _estimate(model: str, recipe: Recipe, gpus: Gpus | None, offline: bool) -> Estimate:
    from vramplan.memory.estimate import estimate
    from vramplan.models.hf_config import UnknownArchitecture

    try:
        if not offline:
            return estimate(model, recipe, gpus)
        located = _located(model)
        return _named(estimate(located.config, recipe, gpus), located)
    except UnknownArchitecture as error:
        raise _offered(error) from None


def _estimate_inference(
    model: str, recipe: Recipe, prompt: str | None, gpus: Gpus | None, offline: bool
) -> InferenceEstimate:
    from vramplan.memory.inference import estimate_inference
    from vramplan.units import parse_count

    values = {name: getattr(recipe, name) for name in _OF_INFERENCE}
    values["context"] = values.pop("seq_len")
    if prompt is not None:
        values["prompt"] = parse_count(prompt, thing="prompt")
    if not offline:
        return estimate_inference(model, **values, gpu=gpus)
    located = _located(model)
    return _named(estimate_inference(located.config, **values, gpu=gpus), located)


def _located(model: str) -> Located:
    from vramplan.models.locate import locate

    return locate(model, offline=True)


def _named(needed: _E, located: Located) -> _E:
    """An estimate of a config under the name by which the config was found."""
    from dataclasses import replace

    return replace(needed, id=located.id, notes=(located.note,) if located.note else ())


def _advice(needed: Estimate) -> tuple[Sequence[Change], Change | None]:
    from vramplan.memory.advice import advise, combine

    return advise(needed), combine(needed)


# --- what is shown --------------------------------------------------------------------------


def _dumped(document: dict[str, Any]) -> str:
    import json

    return json.dumps(document, indent=2)


def _json(
    needed: Estimate,
    changes: Sequence[Change] | None,
    combination: Change | None,
    explain: bool,
) -> str:
    """The estimate's own document; what was asked for besides has keys of its own."""
    document = needed.to_dict()
    if changes is not None:
        document["advice"] = [change.to_dict() for change in changes]
        document["combination"] = None if combination is None else combination.to_dict()
    if explain:
        from vramplan.memory.explain import explain as explained

        document["explanation"] = explained(needed).to_dict()
    return _dumped(document)


def _text(
    needed: Estimate,
    no_gpu: str,
    changes: Sequence[Change] | None,
    combination: Change | None,
    again: Sequence[str],
) -> str:
    from vramplan.cli.terminal import command_line, look
    from vramplan.reports.text import show

    here = look()
    command = ""
    if combination is not None:
        from vramplan.memory.advice import recipe_flags

        command = command_line((*again, *recipe_flags(combination.recipe)), here.width - 2)
    return show(
        needed,
        no_gpu=no_gpu,
        changes=changes,
        combination=combination,
        command=command,
        look=here,
    )


def _explanation(needed: Estimate) -> str:
    from vramplan.memory.explain import explain
    from vramplan.reports.explain import render

    return render(explain(needed)).rstrip("\n")


def _inference_text(needed: InferenceEstimate, no_gpu: str) -> str:
    from vramplan.reports.inference import render

    text = render(needed).rstrip("\n")
    return f"{text}\n\n{no_gpu}" if no_gpu else text


def _again(model: str, card: str | None, offline: bool) -> tuple[str, ...]:
    """What of the command line another recipe leaves as it is."""
    words = ["vramplan", "estimate", model]
    if card is not None:
        words += ["--gpu", card]
    return (*words, "--offline") if offline else tuple(words)
