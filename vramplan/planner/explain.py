"""What lies next to a plan: what a larger card or one more would make of the job, what it would
take where nothing fits, and how two recipes differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.planner.candidates import Candidate
from vramplan.planner.cards import next_larger, notably, smallest_with
from vramplan.planner.goal import METHODS
from vramplan.planner.plan import Plan, plan_for
from vramplan.recipe.recipe import Recipe
from vramplan.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The same job on other cards."""

    gpus: Gpus
    plan: Plan
    method: bool
    """Whether a method of better quality becomes possible."""
    quicker: float | None
    """How many times the tokens a second; None where there was no plan."""
    cost: float | None
    """Its card-hours as a share of the plan's; None where there was no plan."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        pick = self.plan.pick
        return {
            "gpu": self.gpus.gpu.id,
            "count": self.gpus.count,
            "pick": None if pick is None else pick.to_dict(),
            "better_method": self.method,
            "quicker": self.quicker,
            "cost": self.cost,
        }


def larger_card(plan: Plan) -> Step | None:
    """The same number of the next larger card; of cards that are in use the same ones with nothing
    else on them. None where there is none."""
    mine, free = plan.gpus.gpu, plan.gpus.free
    if free is not None and notably(mine.capacity, free):
        alone = replace(mine, name=f"{mine.name} with nothing else on it")
        return _step(plan, Gpus(gpu=alone, count=plan.gpus.count))
    gpu = next_larger(plan.gpus)
    if gpu is None:
        return None
    if plan.gpus.nominal:  # of a bare size only memory is known: so of the larger one
        gpu = _bare(gpu)
    return _step(plan, Gpus(gpu=gpu, count=plan.gpus.count, nominal=plan.gpus.nominal))


def more_cards(plan: Plan) -> Step | None:
    """One more of the same cards, or as many more as it takes to deal the effective batch out."""
    batch = plan.goal.effective_batch
    if "world_size" in plan.goal.pins:
        return None
    for count in range(plan.gpus.count + 1, batch + 1):
        if batch % count == 0:
            return _step(plan, replace(plan.gpus, count=count, others=(), indices=()))
    return None


def _bare(gpu: Gpu) -> Gpu:
    size = -(-gpu.memory // GIB)
    return Gpu(
        id=f"{size}gb",
        name=f"{size} GB card",
        vendor="unknown",
        arch="",
        memory=size * GIB,
        memory_is_reported=False,
    )


def _step(plan: Plan, gpus: Gpus) -> Step:
    then = plan_for(plan, gpus)
    was, pick = plan.pick, then.pick
    if was is None or pick is None:
        return Step(gpus=gpus, plan=then, method=pick is not None, quicker=None, cost=None)
    now, before = then.step_of(pick), plan.step_of(was)
    return Step(
        gpus=gpus,
        plan=then,
        method=METHODS.index(pick.method) < METHODS.index(was.method),
        quicker=before.seconds / now.seconds,
        cost=now.seconds * pick.cards / (before.seconds * was.cards),
    )


def smallest_card(plan: Plan) -> tuple[Gpu, Candidate] | None:
    """Where nothing fits: the smallest card of the catalogue on which the nearest miss would run,
    and that miss."""
    misses = [c for c in plan.misses.values() if c.too_much]
    if not misses:
        return None
    nearest = min(misses, key=lambda c: c.required or 0)
    vendor = "nvidia" if plan.gpus.nominal else plan.gpus.gpu.vendor
    gpu = smallest_with(nearest.required or 0, vendor)
    return None if gpu is None else (gpu, nearest)


def differences(recipe: Recipe, base: Recipe) -> list[str]:
    """What `recipe` has that `base` has not, in words, what matters most first."""
    said = []
    if recipe.world_size != base.world_size:
        said.append(f"{recipe.world_size} card{'s' if recipe.world_size > 1 else ''}")
    if recipe.quantization != base.quantization:
        said.append(f"{recipe.quantization or 'unquantized'} weights")
    if recipe.dtype != base.dtype:
        said.append(f"{recipe.dtype} weights")
    if recipe.gradient_checkpointing != base.gradient_checkpointing:
        said.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.batch_size != base.batch_size:
        said.append(f"micro-batch {recipe.batch_size}")
    if recipe.deepspeed != base.deepspeed:
        said.append(zero_said(recipe))
    for name in ("attention", "optimizer", "mixed_precision"):
        if getattr(recipe, name) != getattr(base, name):
            said.append(str(getattr(recipe, name)))
    if recipe.double_quant != base.double_quant and recipe.quantization in ("nf4", "fp4"):
        said.append("double quant" if recipe.double_quant else "no double quant")
    if recipe.allocator != base.allocator:
        said.append(f"{recipe.allocator} allocator")
    return said


def zero_said(recipe: Recipe) -> str:
    """How several cards, or the host, share the work."""
    zero = recipe.deepspeed
    if zero is None:
        return "DDP" if recipe.world_size > 1 else "no ZeRO"
    said = f"ZeRO-{zero.stage}"
    away = [
        what
        for what, place in (("optimizer", zero.offload_optimizer), ("weights", zero.offload_param))
        if place
    ]
    return f"{said}, {' and '.join(away)} offloaded" if away else said
