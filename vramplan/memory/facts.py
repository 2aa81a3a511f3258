"""What the libraries do that a user may not expect, with what it costs and what helps."""

from __future__ import annotations

from vramplan.errors import IllegalRecipe
from vramplan.memory.states import Layout
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import inventory
from vramplan.recipe.recipe import Recipe
from vramplan.units import format_bytes


def check_positions(arch: Architecture, seq_len: int) -> None:
    """Raises IllegalRecipe for a sequence beyond a table of learned positions."""
    if arch.learned_positions and arch.max_positions and seq_len > arch.max_positions:
        raise IllegalRecipe(
            f"sequence length {seq_len} is beyond this model's {arch.max_positions} positions, "
            f"a learned table that can't be extended: use at most {arch.max_positions}"
        )


def facts(arch: Architecture, recipe: Recipe, layout: Layout) -> list[str]:
    """Warnings about a run, in the order of the run's phases."""
    out = []
    if arch.max_positions and recipe.seq_len > arch.max_positions:
        out.append(
            f"sequence length {recipe.seq_len} is beyond the {arch.max_positions} positions that "
            "the model was trained with: memory is as shown, quality needs position scaling"
        )
    if recipe.quantization:
        out += _quantization_facts(arch, recipe)
    half = recipe.dtype != "fp32" or recipe.mixed_precision != "no"
    if recipe.attention == "sdpa" and not half and arch.kv_heads != arch.heads:
        out.append(
            "in fp32 no fused sdpa kernel takes grouped key-value heads: torch falls back to plain "
            "products, which keep batch x heads x sequence^2; mixed_precision='bf16' avoids it"
        )
    return out


def _quantization_facts(arch: Architecture, recipe: Recipe) -> list[str]:
    out = []
    kept = [
        t
        for t in inventory(arch)
        if t.role in ("linear", "expert") and not t.quantizable and len(t.shape) > 1
    ]
    if kept:
        numel = sum(t.numel * t.count for t in kept)
        out.append(
            f"{format_bytes(numel * 4)} of weights are not quantized: transformers replaces only "
            f"modules that are exactly nn.Linear, so {next(kept[0].names())} and the like keep 16 "
            "bits and are then upcast to fp32; LoRA without quantization may need less"
        )
    if recipe.quantization == "int8" and recipe.gradient_checkpointing:
        out.append(
            "int8 keeps every linear's input on its autograd context, where gradient checkpointing "
            "does not reach it: checkpointing saves little; nf4 has no such cost"
        )
    return out
