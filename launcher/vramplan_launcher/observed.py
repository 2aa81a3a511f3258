"""The recipe of a training script that vramplan did not start: read off its model and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vramplan.errors import UserError
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan_launcher.trace.build import DTYPES

_LOOKED_AT = 256
"""Rows of the data whose lengths are read where nothing else tells the sequence length."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def recipe_of(
    model: Any, arguments: Any, dataset: Any = None, seq_len: int | None = None
) -> Recipe:
    """The recipe of a `Trainer`'s run. Raises UserError for what no recipe describes."""
    lora = _lora(model)
    return Recipe(
        dtype=_dtype(model),
        mixed_precision="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no",
        lora=lora,
        attention=_attention(model),
        gradient_checkpointing=bool(arguments.gradient_checkpointing),
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        batch_size=int(arguments.per_device_train_batch_size),
        seq_len=seq_len or length_of(arguments, dataset),
        gradient_accumulation_steps=int(arguments.gradient_accumulation_steps),
        deepspeed=_deepspeed(arguments),
        world_size=int(arguments.world_size),
        allocator=_allocator(),
        **_quantization(model),
    )


def length_of(arguments: Any, dataset: Any) -> int:
    """Tokens of the longest sequence: as the arguments limit it, or as the first rows are.

    Raises UserError where neither tells.
    """
    for name in ("max_length", "max_seq_length"):  # TRL's SFTConfig
        given = getattr(arguments, name, None)
        if given:
            return int(given)
    try:
        rows = [dataset[index] for index in range(min(_LOOKED_AT, len(dataset)))]
        longest = max(len(row["input_ids"]) for row in rows)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise UserError(
            "the data do not tell their sequence length: MemoryCheck(seq_len=…)"
        ) from error
    return int(longest)


def config_of(model: Any) -> dict[str, Any]:
    """The Hugging Face config, without what the run's quantization wrote into it."""
    values = dict(model.config.to_dict())
    values.pop("quantization_config", None)
    return values


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _dtype(model: Any) -> Any:
    """The weights' own: that of the embedding before anything was upcast, else of most weights."""
    told = getattr(model.config, "dtype", None)
    if isinstance(told, str):
        told = getattr(torch, told, None)
    if told in _NAMES:
        return _NAMES[told]
    counts: dict[torch.dtype, int] = {}
    for value in model.parameters():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    known = {dtype: count for dtype, count in counts.items() if dtype in _NAMES}
    if not known:
        raise UserError("the model's weights are in no dtype that a recipe knows")
    return _NAMES[max(known, key=lambda dtype: known[dtype])]


def _lora(model: Any) -> LoRA | None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values()))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UserError(f"peft's {kind} is not modelled: LoRA is")
    adapters = [p for n, p in model.named_parameters() if "lora_A" in n]
    dtype = _NAMES.get(adapters[0].dtype, "fp32") if adapters else "fp32"
    return LoRA(
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=_adapted(model),
        dtype=dtype,  # type: ignore[arg-type]
    )


def _adapted(model: Any) -> tuple[str, ...]:
    """The kinds of modules that have adapters, as one names them to peft.

    Read off the model: peft keeps full names, a pattern or "all-linear" in its config.
    """
    found = {n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    kinds = {name.rpartition(".")[2] for name in found}
    alike = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in kinds}
    if alike != found:
        raise UserError(
            f"LoRA on {len(found)} of {len(alike)} modules named {', '.join(sorted(kinds))} is not "
            "modelled: on all of them is"
        )
    return tuple(sorted(kinds))


def _attention(model: Any) -> Any:
    name = getattr(_base(model).config, "_attn_implementation", None) or "sdpa"
    return name if name in ("eager", "sdpa", "flash_attention_2") else "sdpa"


def _quantization(model: Any) -> dict[str, Any]:
    config = getattr(_base(model).config, "quantization_config", None)
    if config is None:
        return {}
    values = config if isinstance(config, Mapping) else config.to_dict()
    if values.get("load_in_8bit"):
        return {"quantization": "int8"}
    if values.get("load_in_4bit"):
        return {
            "quantization": values.get("bnb_4bit_quant_type", "fp4"),
            "double_quant": bool(values.get("bnb_4bit_use_double_quant")),
        }
    raise UserError(f"quantization {values.get('quant_method')!r} is not modelled")


def _deepspeed(arguments: Any) -> DeepSpeed | None:
    if not arguments.deepspeed:
        return None
    from vramplan.recipe.ds_config import read_ds_config

    return read_ds_config(arguments.deepspeed).deepspeed


def _allocator() -> Any:
    import os

    said = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return "expandable_segments" if "expandable_segments:True" in said else "default"
