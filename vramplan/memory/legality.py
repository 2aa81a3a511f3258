"""What the libraries refuse of a recipe once the model is known, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.errors import IllegalRecipe, UnknownName
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import Tensor, inventory
from vramplan.recipe.recipe import LoRA, Recipe

WITHOUT_SDPA = ("bloom", "gpt_oss", "gptj")
"""transformers 5.17 refuses sdpa by name for these; a run that names none gets eager."""
WITHOUT_FLASH_ATTENTION_2 = ("bloom", "gpt_oss")
"""Alibi in BLOOM, attention sinks in gpt-oss: flash-attn has no such kernel."""


def check_model(arch: Architecture, recipe: Recipe) -> None:
    """Raises IllegalRecipe or UnknownName for what can't be run with this model."""
    check_positions(arch, recipe.seq_len)
    if recipe.attention == "flash_attention_2" and arch.family in WITHOUT_FLASH_ATTENTION_2:
        raise IllegalRecipe(
            f"attention 'flash_attention_2' with {arch.family}: transformers has no such path for "
            "this family. Use 'eager'"
        )
    zero = recipe.deepspeed
    if zero is not None and zero.offload_param == "nvme":
        _check_buffers(inventory(arch), zero.param_buffer_size, recipe.world_size)
    if recipe.lora is not None and recipe.lora.target_modules != "all-linear":
        _check_targets(inventory(arch), recipe.lora)
    if recipe.lora is not None:
        _check_experts(inventory(arch), recipe.lora)


def _check_buffers(tensors: Sequence[Tensor], buffer: int, ranks: int) -> None:
    """DeepSpeed 0.19.8, runtime/swap_tensor/partitioned_param_swapper.py: a weight's partition is
    read into one buffer of the pool."""
    largest = max((t for t in tensors if t.role != "buffer"), key=lambda t: t.numel)
    part = -(-largest.numel // ranks)
    if part > buffer:
        raise IllegalRecipe(
            f"deepspeed.param_buffer_size {buffer}: a rank's part of {next(largest.names())} has "
            f"{part} elements, and each is read from NVMe into one buffer. Use at least {part}"
        )


def check_positions(arch: Architecture, seq_len: int) -> None:
    """Raises IllegalRecipe for a sequence beyond a table of learned positions."""
    if arch.learned_positions and arch.max_positions and seq_len > arch.max_positions:
        raise IllegalRecipe(
            f"sequence length {seq_len} is beyond this model's {arch.max_positions} positions, "
            f"a learned table that can't be extended: use at most {arch.max_positions} (--seq-len)"
        )


def _check_targets(tensors: Sequence[Tensor], lora: LoRA) -> None:
    """peft passes over a name that matches nothing while another matches: likely a slip."""
    modules = [t.name.removesuffix(".weight") for t in tensors if t.adaptable]
    modules += [former for t in tensors for former in t.former]
    known = sorted({m.rpartition(".")[2] for m in modules})
    for target in lora.target_modules:
        if not any(m == target or m.endswith("." + target) for m in modules):
            raise UnknownName("target module", target, known)


def _check_experts(tensors: Sequence[Tensor], lora: LoRA) -> None:
    """peft 0.21 adapts merged experts and routers through ParamWrapper (tuners/lora/layer.py)."""
    for t in tensors:
        if not t.former:
            continue
        named = [lora.target_modules == "all-linear" or _names(lora, f) for f in t.former]
        if any(named) and not all(named):
            missing = [f for f, n in zip(t.former, named, strict=True) if not n]
            raise IllegalRecipe(
                f"target modules name only a part of {t.name.rpartition('.')[2]}, which merges "
                f"{' and '.join(t.former)}: peft refuses that. Add {', '.join(missing)}"
            )
        if all(named) and lora.dropout > 0:
            raise IllegalRecipe(
                f"lora.dropout {lora.dropout} with adapted experts: peft refuses "
                "('lora.ParamWrapper does not work with lora_dropout != 0'). Set lora.dropout to "
                "0 (--lora-dropout 0), or name only attention modules as targets "
                "(--lora-targets q_proj,k_proj,v_proj,o_proj)"
            )


def _names(lora: LoRA, module: str) -> bool:
    return any(t == module or t.endswith("." + module) for t in lora.target_modules)
