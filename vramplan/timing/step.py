"""step_time(): seconds of one optimizer step, by cause."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.hardware.gpu import Gpus
from vramplan.memory.precision import policy_of
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import inventory
from vramplan.recipe.optimizers import LIBRARIES, find_optimizer
from vramplan.recipe.recipe import Recipe
from vramplan.timing.clock import PARTS, micro_batch
from vramplan.timing.links import BETWEEN_NODES, exchange
from vramplan.timing.rates import ENGINE_TENSOR, rates_of
from vramplan.timing.stepping import Step, step_of


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One optimizer step: all its micro-batches, on all ranks together."""

    seconds: float
    tokens: int
    """Of all micro-batches and ranks."""
    parts: dict[str, float]
    """Seconds by cause; they add up to `seconds`. "launch": the card waits for the host."""
    notes: tuple[str, ...] = ()
    """What was assumed for want of figures."""

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.seconds


UNMEASURED = "the pace of {name}'s step was not measured: pointwise kernels are reckoned"
UNKNOWN = "the rates of {name} are not known: those of a common 24 GB card are taken"


def step_time(
    arch: Architecture, recipe: Recipe, gpus: Gpus, *, network: float = BETWEEN_NODES
) -> StepTime:
    """Seconds of a steady optimizer step of `recipe` on `recipe.world_size` cards like `gpus`.

    `network`: bytes a second that each card has between machines (more than 8 ranks).
    """
    gpu = gpus.gpu
    policy = policy_of(recipe, arch, None if gpus.nominal else gpu.compute_capability)
    steps = recipe.gradient_accumulation_steps
    step = step_of(arch, policy, recipe.optimizer, gpu)
    stage = 0 if recipe.deepspeed is None else recipe.deepspeed.stage
    gathered = _tensors(arch, step, adapters=recipe.lora is not None) if stage == 3 else 0
    spent = micro_batch(arch, policy, gpu, recipe.batch_size, recipe.seq_len, gathered)
    out = {name: steps * value for name, value in zip(PARTS, spent.parts, strict=True)}
    idle = max(0.0, spent.total - sum(spent.parts))
    waiting = steps * (idle + step.start) + step.before + step.after
    out["backward"] += (steps - 1) * 3 * step.gradients / rates_of(gpu).bandwidth
    out["optimizer"], out["communication"], out["offload"] = step.card, 0.0, 0.0
    waiting += max(0.0, step.host - step.card)
    if stage in (1, 2):
        waiting += rates_of(gpu).host * step.tensors * ENGINE_TENSOR
    if recipe.world_size > 1 or recipe.deepspeed is not None:
        # What moves hides behind the card's waiting for the host as behind its work.
        pace = spent.total / sum(spent.parts)
        cover = pace * out["forward"], pace * (out["recompute"] + out["backward"])
        moved = exchange(arch, policy, recipe, gpus, step, cover, network)
        out.update(moved._asdict())
    out["launch"] = waiting
    return StepTime(
        seconds=sum(out.values()),
        tokens=recipe.batch_size * recipe.seq_len * steps * recipe.world_size,
        parts=out,
        notes=_notes(recipe, gpus),
    )


def _tensors(arch: Architecture, step: Step, *, adapters: bool) -> int:
    """Weights that are gathered, and adapters' gradients that are reduced beside theirs."""
    weights = sum(tensor.count for tensor in inventory(arch) if tensor.role != "buffer")
    return weights + (step.tensors if adapters else 0)


def _notes(recipe: Recipe, gpus: Gpus) -> tuple[str, ...]:
    out = []
    if gpus.gpu.fp16 is None:
        out.append(UNKNOWN.format(name=gpus.gpu.name))
    if find_optimizer(recipe.optimizer).package not in LIBRARIES:
        out.append(UNMEASURED.format(name=recipe.optimizer))
    return tuple(out)
