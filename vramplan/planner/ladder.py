"""The ladder: one saving after the other, each on top of those before, with what it does to memory
and to time; and the checklist, every single change by what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from vramplan.errors import UserError
from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.memory.advice import Change, advise, recipe_flags
from vramplan.memory.estimate import Estimate, Model, cards, estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.planner.clock import paged
from vramplan.planner.space import default_lora
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import Recipe
from vramplan.timing.step import step_time
from vramplan.units import format_bytes

START: dict[str, Any] = {
    "dtype": "fp32",
    "attention": "eager",
    "optimizer": "adamw_torch",
    "allocator": "default",
}
"""Where a ladder begins unless told otherwise: what a run is before anything is done for memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A recipe of the ladder. Sizes are bytes."""

    name: str
    recipe: Recipe
    required: int
    peak_allocated: int
    saving: int
    """Of `required`, against the rung before; below zero: it costs memory here."""
    fits: bool | None
    """None where no card is known."""
    seconds: float | None
    """Of an optimizer step; None where no card is known."""
    tokens: int
    alters_training: bool
    """Whether the trained model is another one than the rung's before."""
    flags: tuple[str, ...]
    """What to add to the command line."""
    measured_peak: int | None = None
    """torch's peak in a real run; None: it was not run."""
    measured_seconds: float | None = None
    why: str = ""
    """Of a real run that failed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"recipe": self.recipe.to_dict(), "flags": list(self.flags)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Rungs from the first on, and the single changes of the first by what they save."""

    id: str
    gpus: Gpus | None
    rungs: tuple[Rung, ...]
    skipped: tuple[tuple[str, str], ...]
    """Savings that can't be had here, and why."""
    checklist: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": 1,
            "model": {"id": self.id},
            "gpu": None if self.gpus is None else self.gpus.to_dict(),
            "rungs": [rung.to_dict() for rung in self.rungs],
            "skipped": [{"name": name, "why": why} for name, why in self.skipped],
            "checklist": [change.to_dict() for change in self.checklist],
        }


def start_of(given: dict[str, Any]) -> Recipe:
    """The first rung: START, and over it the fields that were chosen."""
    return Recipe(**{**START, **given})


def ladder(
    model: Model,
    recipe: Recipe | None = None,
    gpu: str | Gpu | Gpus | None = None,
) -> Ladder:
    """Every saving in turn on top of `recipe` (None: START). Raises UserError as `estimate`."""
    name, arch, _ = resolve(model)
    gpus = cards(gpu)
    current = _rung(arch, recipe or start_of({}), gpus, "as it begins", None, False)
    rungs, skipped = [current[0]], []
    first = current[1]
    for title, values, alters in _savings(arch, current[1].recipe):
        base = rungs[-1].recipe
        change = {k: v for k, v in values.items() if getattr(base, k) != v}
        if not change:
            continue
        try:
            then = replace(base, **change)
            rung, _ = _rung(arch, then, gpus, title, rungs[-1], alters)
        except UserError as error:
            skipped.append((title, str(error)))
            continue
        if rung.saving <= 0 and (rung.seconds or 0) >= (rungs[-1].seconds or 0):
            more = "as much" if not rung.saving else f"{format_bytes(-rung.saving)} more"
            skipped.append((title, f"it would need {more} here"))
            continue
        rungs.append(rung)
    return Ladder(
        id=name,
        gpus=gpus,
        rungs=tuple(rungs),
        skipped=tuple(skipped),
        checklist=advise(first),
    )


def _savings(arch: Architecture, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, fields, whether it alters training): what costs nothing first, what costs quality
    last."""
    yield "expandable segments", {"allocator": "expandable_segments"}, False
    yield "sdpa attention", {"attention": "sdpa"}, False
    yield "fused optimizer", {"optimizer": "adamw_torch_fused"}, False
    yield "checkpointing", {"gradient_checkpointing": True}, False
    steps = recipe.gradient_accumulation_steps * recipe.batch_size
    if recipe.batch_size > 1:
        small = {"batch_size": 1, "gradient_accumulation_steps": steps}
        yield "micro-batch 1", small, False
    yield "8-bit states", {"optimizer": "adamw_8bit"}, True
    yield "paged optimizer", {"optimizer": "paged_adamw_8bit"}, False
    yield "bf16 weights", {"dtype": "bf16"}, recipe.lora is None
    if recipe.lora is None:
        yield "LoRA", {"lora": default_lora(arch)}, True
    yield "int8 weights", {"quantization": "int8"}, True
    yield "nf4 weights", {"quantization": "nf4"}, True
    offloaded = DeepSpeed(stage=3, offload_optimizer="cpu", offload_param="cpu")
    last = {"quantization": None, "deepspeed": offloaded, "optimizer": "adamw_torch_fused"}
    yield "ZeRO-3, all offloaded", last, True


def _rung(
    arch: Architecture,
    recipe: Recipe,
    gpus: Gpus | None,
    name: str,
    before: Rung | None,
    alters: bool,
) -> tuple[Rung, Estimate]:
    needed = estimate(arch, recipe, gpus)
    tokens = recipe.batch_size * recipe.seq_len
    tokens *= recipe.gradient_accumulation_steps * recipe.world_size
    rung = Rung(
        name=name,
        recipe=recipe,
        required=needed.required,
        peak_allocated=needed.peak_allocated,
        saving=0 if before is None else before.required - needed.required,
        fits=needed.fits,
        seconds=None if gpus is None else seconds_of(needed, gpus),
        tokens=tokens,
        alters_training=alters,
        flags=() if before is None else recipe_flags(recipe, before.recipe),
    )
    return rung, needed


def seconds_of(needed: Estimate, gpus: Gpus) -> float:
    """Of an optimizer step, with the paging of what has no room."""
    room = needed.available or 0
    out = min(needed.managed, max(0, needed.required + needed.managed - room))
    return paged(step_time(needed.architecture, needed.recipe, gpus), out, gpus.gpu).seconds
