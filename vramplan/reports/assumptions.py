"""What an estimate takes for granted, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.recipe import Recipe

CHECKED_WITH = "torch 2.11 to 2.13, transformers 5.17, peft 0.21, bitsandbytes 0.50"
"""The versions whose code the rules follow; each rule names its own source."""


def assumptions(needed: Estimate) -> tuple[str, ...]:
    """What the figures hold under; the model's own notes last."""
    recipe = needed.recipe
    said = [
        _step(recipe),
        f"Every sequence has exactly {recipe.seq_len} tokens: no padding, no packing.",
        _allocator(recipe.allocator),
        _context(needed),
        _workspace(needed),
    ]
    if needed.gpu is not None:
        said += _card(needed.gpu)
    said += _ranks(needed)
    said.append(f"The libraries do as in {CHECKED_WITH}.")
    return (*said, *(f"{note}." for note in needed.notes))


def _context(needed: Estimate) -> str:
    size = format_bytes(needed.overhead["context"])
    here = getattr(needed, "measured_here", None)  # a trace has none
    if here is not None:
        return f"CUDA context {size}, {here.source}."
    return (
        f"CUDA context {size}, as measured on a data centre card; other cards and drivers differ."
    )


def _step(recipe: Recipe) -> str:
    optimizer = OPTIMIZERS[recipe.optimizer]
    freed = "after each step"
    if optimizer.stepping == "in_backward":
        freed = "within backward, where the optimizer steps"
    said = (
        "Trainer's plain loop in a steady step: optimizer states exist, and gradients are freed "
        f"{freed}."
    )
    if optimizer.low_rank is None:
        return said
    return f"{said} In this step projections are renewed (update_proj_gap)."


def _allocator(allocator: str) -> str:
    if allocator == "default":
        return (
            "torch's default allocator, which fragments; expandable segments need less "
            "(--allocator expandable_segments)."
        )
    return "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is set for the run."


def _workspace(needed: Estimate) -> str:
    size = format_bytes(needed.workspace)
    gpus = needed.gpu
    if gpus is None or gpus.gpu.compute_capability is None:
        return f"cuBLAS workspaces of {size}: the card is unknown, so those of a Hopper card."
    return f"cuBLAS workspaces of {size}, as torch sizes them for this card."


def _card(gpus: Gpus) -> list[str]:
    said = []
    if gpus.nominal:
        said.append(
            f"{gpus.gpu.name}: the size as sold; drivers report somewhat less. A card by its name "
            "(`vramplan gpus`) has its own figure."
        )
    elif not gpus.gpu.memory_is_reported:
        said.append(f"{gpus.gpu.name}: the size as sold; no driver's figure is known.")
    if gpus.free is None and not gpus.nominal:
        said.append("Nothing else uses the card: no display, no other process.")
    return said


def _ranks(needed: Estimate) -> list[str]:
    gpus, recipe = needed.gpu, needed.recipe
    said = []
    if recipe.deepspeed is not None:
        said.append(
            "DeepSpeed 0.19.8 through TrainingArguments(deepspeed=...), its AdamW for torch's; "
            f"shown is rank {needed.sharded.rank if needed.sharded else 0}, which needs most."
        )
    if recipe.world_size > 1:
        said.append(
            "NCCL's own memory as measured between two and four H100 through NVLink; other links, "
            "and more GPUs, may take more or less."
        )
        if recipe.deepspeed is None:
            said.append(
                "torch's DDP as Trainer wraps the model: ddp_find_unused_parameters is left to it."
            )
    elif gpus is not None and gpus.count > 1:
        said.append(
            f"The run uses one of the {gpus.count} cards: CUDA_VISIBLE_DEVICES names it. Started "
            "with several in sight, Trainer splits each batch over them with DataParallel."
        )
    return said
