"""estimate(): the facade. A model, a recipe and a GPU in; bytes by phase and category out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vramplan.errors import InvalidValue
from vramplan.hardware.catalogue import Gpu, Gpus, warnings_for
from vramplan.hardware.measured_overheads import Measured, overhead_of
from vramplan.hardware.uneven import parse_cards
from vramplan.memory import allocator
from vramplan.memory.facts import facts
from vramplan.memory.legality import check_model
from vramplan.memory.needs import Needs, document
from vramplan.memory.precision import Policy, policy_of
from vramplan.memory.timeline import Parts, Timeline, parts, run_timeline
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture
from vramplan.recipe.recipe import Recipe
from vramplan.recipe.rules import cautions

if TYPE_CHECKING:
    from vramplan.memory.host import Host
    from vramplan.memory.sharding import Sharded

CATEGORIES = (
    "parameter",
    "gradient",
    "optimizer",
    "activation",
    "logits",
    "temporary",
    "buffer",
    "workspace",
)
Model = str | os.PathLike[str] | Mapping[str, Any] | Architecture


@dataclass(frozen=True, kw_only=True)
class Estimate(Needs):
    """What a run needs. Sizes are bytes on one GPU."""

    id: str
    architecture: Architecture
    recipe: Recipe
    gpu: Gpus | None
    timeline: Timeline
    managed: int
    """Optimizer states in CUDA managed memory (paged optimizers): host memory under pressure."""
    workspace: int
    parts: Parts = field(repr=False)
    policy: Policy = field(repr=False)
    notes: tuple[str, ...] = ()
    """What was assumed of the model (how its name was read, and the like)."""
    sharded: Sharded | None = field(repr=False, default=None)
    """Under DeepSpeed: this rank's part, and its host memory."""

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied weights once, without adapters."""
        return self.parts.layout.parameters

    @property
    def trainable_parameters(self) -> int:
        """Parameters that get gradients."""
        return self.parts.layout.trainable_parameters

    @property
    def peak_allocated(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return self.timeline.peak

    @property
    def peak_phase(self) -> str:
        """The phase in which the peak falls."""
        return self.timeline.peak_phase

    @property
    def host(self) -> Host | None:
        """A rank's host memory, where it keeps something there."""
        if self.sharded is not None:
            return self.sharded.host
        if not self.parts.stepping.host:
            return None
        from vramplan.memory.host import Host

        return Host(pageable=self.parts.stepping.host)

    @cached_property
    def overhead(self) -> dict[str, int]:
        """What the device holds beyond `peak_allocated`."""
        zero = self.recipe.deepspeed
        reduces = zero is not None and (
            zero.stage in (1, 2) or (zero.stage == 3 and zero.overlap_comm)
        )
        ranks = self.recipe.world_size
        context = allocator.context(self.recipe.quantization, reduces)
        nccl = allocator.nccl(ranks, None if zero is None else zero.stage)
        here = self.measured_here
        if here is not None:
            context = here.context
            nccl = here.nccl if ranks > 1 and here.nccl is not None else nccl
        return {
            "context": context,
            "nccl": nccl,
            "allocator_slack": allocator.slack(
                self.peak_allocated, self.recipe.allocator, self.parts.stepping.largest
            ),
        }

    @cached_property
    def measured_here(self) -> Measured | None:
        """What runs on this machine's card had outside the allocator; None: no run measured it."""
        zero = self.recipe.deepspeed is not None
        return overhead_of(self.gpu, self.recipe.quantization, zero=zero)

    @cached_property
    def breakdown(self) -> dict[str, int]:
        """Bytes by category at the instant of the peak; they add up to `peak_allocated`."""
        return _breakdown(self)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Facts about this run that cost memory or may surprise, each with what to do."""
        out = list(cautions(self.recipe))
        out += facts(self.architecture, self.recipe, self.policy)
        if self.gpu is not None:
            uses_bf16 = "bf16" in (self.recipe.dtype, self.recipe.mixed_precision)
            out += warnings_for(self.gpu.gpu, uses_bf16=uses_bf16, attention=self.recipe.attention)
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `vramplan estimate --json` prints it."""
        plain = document(self)
        if self.host is not None:
            plain["host"] = self.host._asdict()
        return plain


def estimate(
    model: Model,
    recipe: Recipe = Recipe(),  # noqa: B008
    gpu: str | Gpu | Gpus | None = None,
    *,
    rank: int | None = None,
) -> Estimate:
    """Estimate the GPU memory of fine-tuning `model` by `recipe`.

    `model`: a Hub id, a folder, a config.json's path, a dict of a Hugging Face config, or an
    Architecture. `gpu`: a name or size ("24GB", "rtx-4090"), or None. `rank`: of several, which
    one's memory; None: the one that needs most.

    Raises UserError (ModelNotFound, ConfigError, UnknownName, IllegalRecipe) for what is wrong with
    the input.
    """
    name, arch, notes = resolve(model)
    check_model(arch, recipe)
    card = cards(gpu)
    capability = card.gpu.compute_capability if card is not None and not card.nominal else None
    policy = policy_of(recipe, arch, capability)
    batch, seq, steps = recipe.batch_size, recipe.seq_len, recipe.gradient_accumulation_steps
    part = None
    if recipe.deepspeed is None:
        run = parts(arch, policy, recipe.optimizer, recipe.allocator)
        if recipe.world_size > 1:
            from vramplan.memory.ddp import replica, replicated

            run = replicated(run, replica(arch, policy, recipe.allocator))
        workspace = allocator.workspaces(capability, run.program.epilogues)
        timeline = run_timeline(run, batch, seq, steps, workspace)
    else:
        from vramplan.memory.zero import zero_estimate

        run, part, timeline, workspace = zero_estimate(arch, policy, recipe, capability, rank)
    return Estimate(
        id=name,
        architecture=arch,
        recipe=recipe,
        gpu=card,
        timeline=timeline,
        managed=run.stepping.managed,
        workspace=workspace,
        parts=run,
        policy=policy,
        notes=notes,
        sharded=part,
    )


def resolve(model: Model) -> tuple[str, Architecture, tuple[str, ...]]:
    """A model's name, its figures, and notes about how it was found."""
    if isinstance(model, Architecture):
        return model.family, model, ()
    from vramplan.models.locate import locate

    located = locate(model)
    notes = [located.note] if located.note else []
    stored = located.config.get("quantization_config")
    if stored:
        method = stored.get("quant_method", "?") if isinstance(stored, Mapping) else stored
        notes.append(
            f"the checkpoint is stored quantized ({method}); estimated are the weights as "
            "--dtype and --quantization say"
        )
    return located.id, architecture(located.config), tuple(notes)


def cards(gpu: str | Gpu | Gpus | None) -> Gpus | None:
    """The cards that an argument `gpu` means. Raises UnknownName or InvalidValue."""
    if isinstance(gpu, str):
        return parse_cards(gpu)
    if isinstance(gpu, Gpu):
        return Gpus(gpu=gpu)
    if gpu is not None and not isinstance(gpu, Gpus):
        raise InvalidValue("gpu", gpu, 'a name or size ("rtx-4090", "24GB"), a Gpu, Gpus, or None')
    return gpu


def _breakdown(e: Estimate) -> dict[str, int]:
    timeline, recipe = e.timeline, e.recipe
    out = dict.fromkeys(CATEGORIES, 0)
    phase = e.peak_phase
    if e.sharded is not None:
        from vramplan.memory.zero_timeline import zero_breakdown

        batch, seq = recipe.batch_size, recipe.seq_len
        stage = recipe.deepspeed.stage if recipe.deepspeed is not None else 0
        out.update(zero_breakdown(e.sharded, timeline, e.workspace, batch, seq, stage))
        left = "activation" if phase in ("forward", "backward") else "temporary"
        out[left] += e.peak_allocated - sum(out.values())
        return out
    if phase in ("load", "prepare"):
        buckets = e.parts.buckets if phase == "prepare" else 0
        out["parameter"] = getattr(timeline, phase).end - buckets
        out["buffer"] = buckets
        out["temporary"] = e.peak_allocated - out["parameter"] - buckets
        return out
    out["parameter"] = e.parts.layout.weights
    out["buffer"] = e.parts.buckets
    out["optimizer"] = e.parts.stepping.states
    out["workspace"] = e.workspace
    out["gradient"] = timeline.held_gradients
    if phase == "optimizer_step":
        out["gradient"] = e.parts.layout.gradients
    else:
        points = list(timeline.points)
        mine = [i for i, p in enumerate(points) if p.section.phase == phase]
        index = max(mine, key=lambda i: points[i].peak)
        program = e.parts.program
        live = program.live_at(points, index, recipe.batch_size, recipe.seq_len)
        for category, size in live.items():
            out[category] += size
    rest = e.peak_allocated - sum(out.values())
    out["temporary" if phase == "optimizer_step" else "activation"] += rest  # and the inputs
    return out
