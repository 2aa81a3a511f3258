"""What the libraries do that a user may not expect, with what it costs and what helps."""

from __future__ import annotations

from collections.abc import Iterator

from vramplan.memory import outliers
from vramplan.memory.legality import WITHOUT_SDPA
from vramplan.memory.precision import Policy
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import Tensor, inventory
from vramplan.recipe.recipe import Recipe
from vramplan.units import format_bytes


def facts(arch: Architecture, recipe: Recipe, policy: Policy) -> Iterator[str]:
    """Warnings about a run, each a sentence without its full stop."""
    if arch.max_positions and recipe.seq_len > arch.max_positions:
        yield (
            f"sequence length {recipe.seq_len} is beyond the {arch.max_positions} positions that "
            "the model was trained with: memory is as shown, quality needs position scaling"
        )
    yield from _attention_facts(arch, recipe, policy)
    tensors = inventory(arch)
    if recipe.quantization:
        yield from _quantization_facts(tensors, recipe)
    if recipe.quantization == "int8":
        yield from _int8_facts(arch, recipe)
    if recipe.lora is not None:
        yield from _adapter_facts(tensors, recipe, policy)
    if policy.copies_outputs:
        yield from _ddp_facts(arch, recipe)


def _attention_facts(arch: Architecture, recipe: Recipe, policy: Policy) -> Iterator[str]:
    if recipe.attention == "sdpa" and arch.family in WITHOUT_SDPA:
        yield (
            f"transformers has no sdpa for {arch.family}: estimated is eager attention, which it "
            "takes when none is named; memory grows with the square of the sequence"
        )
        return
    half = recipe.dtype != "fp32" or recipe.mixed_precision != "no"
    if recipe.attention == "sdpa" and not half and arch.kv_heads != arch.heads:
        yield (
            "in fp32 no fused sdpa kernel takes grouped key-value heads: torch falls back to plain "
            "products, which keep batch x heads x sequence^2; mixed precision bf16 avoids it"
        )
    if recipe.attention == "sdpa" and policy.beyond_window:
        mask = recipe.batch_size * recipe.seq_len**2 * 2
        yield (
            f"at {recipe.seq_len} tokens, the sliding window of {arch.sliding_window} needs a "
            f"mask: {format_bytes(mask)} a layer under sdpa, kept for backward; "
            "flash_attention_2 needs none"
        )


def _quantization_facts(tensors: tuple[Tensor, ...], recipe: Recipe) -> Iterator[str]:
    kept = [
        t
        for t in tensors
        if t.role in ("linear", "expert") and not t.quantizable and len(t.shape) > 1
    ]
    if not kept:
        return
    wide = format_bytes(sum(t.numel * t.count for t in kept) * 4)
    half = format_bytes(sum(t.numel * t.count for t in kept) * 2)
    name = next(kept[0].names())
    what = "experts are parameters, not" if kept[0].role == "expert" else "these are no plain"
    yield (
        f"{recipe.quantization} leaves {name} and the like as they are ({what} nn.Linear), and "
        f"preparing for k-bit training then upcasts them to fp32: {wide}, where LoRA without "
        f"quantization holds {half}"
    )


def _int8_facts(arch: Architecture, recipe: Recipe) -> Iterator[str]:
    if recipe.gradient_checkpointing:
        yield (
            "int8 keeps every linear's input on its autograd context, where gradient checkpointing "
            "does not reach it: checkpointing saves little; nf4 has no such cost"
        )
    tokens = recipe.batch_size * recipe.seq_len
    part = outliers.share(int(arch.deviation * outliers.MICRO), tokens) if arch.gated else 0.0
    if part >= 0.01:
        yield (
            f"int8 keeps columns with an element of 6 or more in full: {100 * part:.0f} % of each "
            "down projection's input is reckoned, as with freshly initialised weights; how many a "
            "trained checkpoint has was not measured"
        )


def _adapter_facts(tensors: tuple[Tensor, ...], recipe: Recipe, policy: Policy) -> Iterator[str]:
    folded = [t for t in tensors if t.role == "expert" and policy.adapts_parameter(t.former)]
    if not folded:
        return
    layer = sum(t.numel for t in folded) * (4 if recipe.quantization else 2)
    kept = "" if recipe.gradient_checkpointing else ", kept for backward in every layer"
    yield (
        f"adapted experts are folded into a full copy of a layer's experts ({format_bytes(layer)}) "
        f"in each forward{kept}; adapting attention alone, or checkpointing, avoids it"
    )


def _ddp_facts(arch: Architecture, recipe: Recipe) -> Iterator[str]:
    width = 4 if recipe.mixed_precision != "no" or recipe.dtype == "fp32" else 2
    copy = recipe.batch_size * recipe.seq_len * arch.vocab_size * width
    yield (
        "Trainer lets DDP look for unused parameters, and DDP then clones the logits in each "
        f"forward: {format_bytes(copy)}; TrainingArguments(ddp_find_unused_parameters=False) "
        "avoids it"
    )
