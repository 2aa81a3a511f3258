"""The time of a candidate's step, and what a plan costs."""

from __future__ import annotations

from dataclasses import replace

from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.models.architecture import Architecture
from vramplan.recipe.recipe import Recipe
from vramplan.timing.cost import Cost, cost
from vramplan.timing.links import paging_seconds
from vramplan.timing.step import StepTime, step_time


def seconds_of(arch: Architecture, recipe: Recipe, gpus: Gpus) -> float | None:
    """Seconds of an optimizer step."""
    return step_time(arch, recipe, gpus).seconds


def paged(step: StepTime, nbytes: int, gpu: Gpu) -> StepTime:
    """The step with the time that paging takes."""
    if not nbytes:
        return step
    extra = paging_seconds(nbytes, gpu)
    parts = {**step.parts, "offload": step.parts.get("offload", 0.0) + extra}
    return replace(step, seconds=step.seconds + extra, parts=parts)


def cost_of(step: StepTime, tokens: int, gpus: Gpus, cards: int, price: float | None) -> Cost:
    """What training costs on `cards` of them: those that are not used cost nothing here."""
    return cost(step, tokens, replace(gpus, count=cards), price)
