"""`vramplan estimate --mode inference`: weights, KV cache and logits, when nothing is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vramplan.cli.asked import Asked, named

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.inference import InferenceEstimate
    from vramplan.recipe.recipe import Recipe

OF_INFERENCE = ("dtype", "quantization", "double_quant", "attention", "batch_size", "seq_len")
"""What of a recipe counts."""


def answer(
    asked: Asked, recipe: Recipe, prompt: str | None, gpus: Gpus | None, no_gpu: str
) -> bool | None:
    """Prints the estimate; whether it fits."""
    needed = _estimate(asked, recipe, prompt, gpus)
    if asked.as_json:
        import json

        click.echo(json.dumps(needed.to_dict(), indent=2))
    else:
        from vramplan.reports.inference import render

        text = render(needed).rstrip("\n")
        click.echo(f"{text}\n\n{no_gpu}" if no_gpu else text)
    return needed.fits


def _estimate(
    asked: Asked, recipe: Recipe, prompt: str | None, gpus: Gpus | None
) -> InferenceEstimate:
    from vramplan.memory.inference import estimate_inference
    from vramplan.units import parse_count

    values = {name: getattr(recipe, name) for name in OF_INFERENCE}
    values["context"] = values.pop("seq_len")
    if prompt is not None:
        values["prompt"] = parse_count(prompt, thing="prompt")
    if not asked.offline:
        return estimate_inference(asked.model, **values, gpu=gpus)
    located = asked.located()
    return named(estimate_inference(located.config, **values, gpu=gpus), located)
