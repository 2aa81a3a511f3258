"""LLaMA-Factory's YAML, read into a recipe.

What a key means: LLaMA-Factory 0.9.6, src/llamafactory/hparams/, and what is done with it:
model/loader.py, model/adapter.py (init_adapter), model/model_utils/quantization.py,
checkpointing.py and attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vramplan.errors import IllegalRecipe, InvalidValue, UserError
from vramplan.recipe.exchange import llama_factory_keys, trainer_keys
from vramplan.recipe.exchange.deepspeed import with_deepspeed
from vramplan.recipe.exchange.keys import Keys, words
from vramplan.recipe.exchange.result import Imported, Options
from vramplan.recipe.exchange.training_arguments import made, trainer, trainer_options
from vramplan.recipe.recipe import ALL_LINEAR

OWN = words("finetuning_type stage cutoff_len quantization_bit pure_bf16 flash_attn lora_target")
"""Keys by which a file of LLaMA-Factory's is told."""
_ATTENTION = {
    "auto": "sdpa",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_2",
}


def read(values: Mapping[str, Any], name: str, folder: str = ".") -> Imported:
    """A run by its YAML's keys. Raises UserError: wrong values, or a run that is not modelled."""
    keys = Keys(values, name)
    model = keys.text("model_name_or_path")
    if model is None:
        raise UserError(f"{name} has no model_name_or_path")
    stage, method = keys.take("stage", "sft"), keys.take("finetuning_type", "lora")
    if stage not in ("sft", "pt"):
        raise IllegalRecipe(f"{name}: stage {stage} can't be estimated: sft and pt can")
    if method not in ("lora", "full"):
        raise IllegalRecipe(f"{name}: finetuning_type {method} can't be estimated: lora, full can")
    packing = keys.take("packing", stage == "pt")
    fields = trainer(keys)
    fields["attention"] = keys.choice("flash_attn", _ATTENTION, "sdpa")
    fields["seq_len"] = keys.count("cutoff_len", 2048)
    fields["gradient_checkpointing"] = _checkpointing(keys)
    fields |= _quantization(keys)
    adapters = _lora(keys)
    fields["lora"] = adapters if method == "lora" else None
    fields = with_deepspeed(keys, fields, folder)
    fields["dtype"] = _dtype(keys, fields)
    if not packing:
        keys.quiet.append("packing (estimated for rows of the full cutoff_len)")
    options = _options(keys)
    keys.finish(
        {**trainer_keys.UNMODELLED, **llama_factory_keys.UNMODELLED},
        trainer_keys.HARMLESS | llama_factory_keys.HARMLESS,
    )
    return Imported(
        kind="llama-factory",
        model=model,
        recipe=made(fields, name),
        options=options,
        warnings=tuple(keys.warnings),
        quiet=tuple(keys.quiet),
    )


def _checkpointing(keys: Keys) -> bool:
    """On unless disabled; reentrant unless said otherwise (checkpointing.py)."""
    keys.take("gradient_checkpointing")
    on = not keys.flag("disable_gradient_checkpointing")
    if keys.flag("use_reentrant_gc", True) and on:
        keys.quiet.append("use_reentrant_gc (estimated as non-reentrant checkpointing)")
    return on


def _quantization(keys: Keys) -> dict[str, Any]:
    bits = keys.count("quantization_bit", None)
    by, kind = keys.take("quantization_method", "bnb"), keys.take("quantization_type", "nf4")
    double = keys.flag("double_quantization", True)
    if bits is None:
        return {"quantization": None, "double_quant": double}
    if by not in ("bnb", "bitsandbytes"):
        raise IllegalRecipe(f"{keys.name}: quantization_method {by} can't be estimated: bnb can")
    if bits not in (4, 8):
        raise InvalidValue(f"{keys.name}: quantization_bit", bits, "4 or 8")
    keys.warn(
        "LLaMA-Factory leaves embeddings, norms and the output head in 16 bits, which peft's "
        "preparation turns to fp32: the estimate is high by 2 bytes for each of these"
    )
    return {"quantization": str(kind) if bits == 4 else "int8", "double_quant": double}


def _lora(keys: Keys) -> dict[str, Any]:
    targets = keys.names("lora_target") or ("all",)
    return {
        "rank": keys.count("lora_rank", 8),
        "alpha": keys.number("lora_alpha", None),
        "dropout": keys.number("lora_dropout", 0.0),
        "target_modules": ALL_LINEAR if targets in (("all",), (ALL_LINEAR,)) else targets,
    }


def _dtype(keys: Keys, fields: Mapping[str, Any]) -> str:
    """adapter.py, init_adapter: what is trained is turned to fp32, but under stage 3 or pure_bf16.

    Weights are loaded in the dtype of mixed precision; without it, in bf16 where the card has it
    (model/model_utils/misc.py, infer_optim_dtype).
    """
    pure = keys.flag("pure_bf16")
    lora, precision = fields["lora"], fields["mixed_precision"]
    loaded = "bf16" if pure or precision == "no" else precision
    if lora is not None:
        if pure:
            lora["dtype"] = "bf16"
        return str(loaded)
    if pure or fields.get("deepspeed") is not None:  # the engine has fp32 masters of its own
        return str(loaded)
    return "fp32"


def _options(keys: Keys) -> Options:
    found = trainer_options(keys)
    data = keys.left.get("dataset")
    return replace(found, data=data if isinstance(data, str) else None)
