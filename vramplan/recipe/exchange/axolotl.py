"""Axolotl's YAML: read into a recipe, and written from one.

What a key means: axolotl 0.18, src/axolotl/utils/schemas/config.py for defaults, and
src/axolotl/loaders/model.py, loaders/adapter.py and core/builders/base.py for what is done.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vramplan.errors import IllegalRecipe, InvalidValue, UserError
from vramplan.recipe.exchange.axolotl_keys import HARMLESS, REFUSED, UNMODELLED
from vramplan.recipe.exchange.deepspeed import with_deepspeed
from vramplan.recipe.exchange.keys import LOGITS_SMALLER, OFFLOADED, OTHER_KERNEL, Keys
from vramplan.recipe.exchange.result import Imported, Options
from vramplan.recipe.exchange.training_arguments import made, projected
from vramplan.recipe.recipe import ALL_LINEAR

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Older flags, in the order in which axolotl looks at them (schemas/enums.py,
# LEGACY_ATTN_FLAG_TO_IMPL).
_FLAGS = {
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
_NEAR_ATTENTION = {
    "flash_attention_3": "flash_attention_2",
    "xformers": "sdpa",
    "sage": "sdpa",
    "fp8": "sdpa",
    "flex_attention": "sdpa",
}
# "…layers.[\\d]+.(mlp|self_attn).(up|down|q|k)_proj", as multimodal models' examples have it.
_ENDING = re.compile(r"\((?:\?:)?(?P<names>\w+(?:\|\w+)*)\)(?P<tail>_\w+)?\$?$")
# The names axolotl has for what transformers calls otherwise.
_OPTIMIZERS = {
    "ao_adamw_4bit": "adamw_torch_4bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "optimi_adamw": "stable_adamw",
}


def read(values: Mapping[str, Any], name: str, folder: str = ".") -> Imported:
    """A run by its YAML's keys. Raises UserError: wrong values, or a run that is not modelled."""
    keys = Keys(values, name)
    for key, why in REFUSED.items():
        if keys.take(key):
            raise IllegalRecipe(f"{name}: {key} can't be estimated: {why}")
    model = keys.text("base_model")
    if model is None:
        raise UserError(f"{name} has no base_model")
    fields: dict[str, Any] = {
        **_precision(keys),
        "attention": _attention(keys),
        "gradient_checkpointing": _checkpointing(keys),
        "optimizer": keys.optimizer("optimizer", "adamw_torch_fused", same=_OPTIMIZERS),
        **_batch(keys),
    }
    fields |= _method(keys, fields)
    _sequences(keys)
    fields |= projected(keys, fields["optimizer"])
    fields = with_deepspeed(keys, fields, folder)
    _leftovers(keys, fields)
    options = _options(keys)
    keys.finish(UNMODELLED, HARMLESS)
    return Imported(
        kind="axolotl",
        model=model,
        recipe=made(fields, name),
        options=options,
        warnings=tuple(keys.warnings),
        quiet=tuple(keys.quiet),
    )


def _precision(keys: Keys) -> dict[str, Any]:
    """utils/config/__init__.py, resolve_dtype: the weights' dtype; base.py: what Trainer gets."""
    bf16 = keys.take("bf16", "auto")
    if bf16 not in ("auto", "full", True, False):
        raise InvalidValue(f"{keys.name}: bf16", bf16, "auto, true, false or full")
    old = keys.flag("bfloat16")
    fp16, old_fp16 = keys.flag("fp16"), keys.flag("float16")
    keys.take("float32")
    if bf16 == "auto":  # a card that has bf16; asked-for fp16 wins
        bf16 = not (fp16 or old_fp16)
    if bf16 or old:
        return {"dtype": "bf16", "mixed_precision": "no" if bf16 == "full" else "bf16"}
    half = fp16 or old_fp16 or bool(keys.left.get("load_in_8bit"))
    return {"dtype": "fp16" if half else "fp32", "mixed_precision": "fp16" if fp16 else "no"}


def _attention(keys: Keys) -> str:
    flags = [name for name in _FLAGS if keys.flag(name)]
    named = keys.text("attn_implementation")
    named = named or (_FLAGS[flags[0]] if flags else "sdpa")
    if named in ("eager", "sdpa", "flash_attention_2"):
        return named
    near = _NEAR_ATTENTION.get(named, "sdpa")
    keys.warn(f"attn_implementation: {named} is not modelled: estimated as {near}")
    return near


def _checkpointing(keys: Keys) -> bool:
    value = keys.take("gradient_checkpointing", False)
    options = keys.table("gradient_checkpointing_kwargs")
    if isinstance(value, str) and value.lower() in ("offload", "offload_disk", "unsloth"):
        keys.warn(f"gradient_checkpointing: {value} is estimated as true: {OFFLOADED}")
        value = True
    if type(value) is not bool:
        allowed = "true, false, offload or offload_disk"
        raise InvalidValue(f"{keys.name}: gradient_checkpointing", value, allowed)
    if value and options.get("use_reentrant"):
        keys.warn("use_reentrant: true is estimated as non-reentrant checkpointing")
    return bool(value)


def _batch(keys: Keys) -> dict[str, Any]:
    micro = keys.count("micro_batch_size", 1)
    steps, whole = keys.count("gradient_accumulation_steps", None), keys.count("batch_size", None)
    if steps is None and whole is not None:  # normalize_config
        steps = max(1, whole // micro)
    return {
        "batch_size": micro,
        "gradient_accumulation_steps": steps or 1,
        "seq_len": keys.count("sequence_len", 512),
    }


def _method(keys: Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    """loaders/model.py, _set_quantization_config; loaders/adapter.py, _build_peft_lora_config."""
    adapter = keys.text("adapter")
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    given = keys.table("bnb_config_kwargs")
    if adapter not in (None, "lora", "qlora"):
        raise IllegalRecipe(f"{keys.name}: adapter {adapter} can't be estimated: lora or qlora can")
    quantization = None
    if four and adapter != "lora":
        quantization = str(given.get("bnb_4bit_quant_type", "nf4"))
    elif four:
        keys.warn("load_in_4bit counts with adapter qlora only: the weights stay as they are")
    if eight and not four and adapter != "qlora":
        quantization = "int8"
    double = bool(given.get("bnb_4bit_use_double_quant", True))
    method = {"quantization": quantization, "double_quant": double}
    if adapter is None:
        return method
    rank = keys.count("lora_r", None)
    if rank is None:
        raise UserError(f"{keys.name}: adapter {adapter} without lora_r: the rank is needed")
    every = keys.flag("lora_target_linear")
    targets = _targets(keys)
    if not every and not targets:
        raise UserError(f"{keys.name}: neither lora_target_linear nor lora_target_modules is set")
    cast = keys.flag("peft_autocast_adapter_dtype", True)
    return method | {
        "lora": {
            "rank": rank,
            "alpha": keys.number("lora_alpha", None),
            "dropout": keys.number("lora_dropout", 0.0),
            "target_modules": ALL_LINEAR if every or targets == (ALL_LINEAR,) else targets,
            # Those of int8 weights peft makes in fp32, asked to or not.
            "dtype": "fp32" if cast or quantization == "int8" else fields["dtype"],
        }
    }


def _targets(keys: Keys) -> tuple[str, ...]:
    """Names; or of a lone text, which peft takes for a regular expression, those it ends in."""
    given = keys.left.get("lora_target_modules")
    if not isinstance(given, str) or re.fullmatch(r"[\w.,\s-]*", given):
        return keys.names("lora_target_modules")
    keys.take("lora_target_modules")
    ending = _ENDING.search(given)
    if ending is None:
        raise IllegalRecipe(
            f"{keys.name}: lora_target_modules {given!r} can't be read: it is a regular "
            "expression; name the modules"
        )
    tail = ending["tail"] or ""
    targets = tuple(name + tail for name in ending["names"].split("|"))
    keys.warn(f"lora_target_modules, a regular expression, is estimated as {', '.join(targets)}")
    return targets


def _sequences(keys: Keys) -> None:
    packed = keys.flag("sample_packing")
    if not packed and not keys.flag("pad_to_sequence_len"):
        keys.quiet.append("sample_packing (estimated for rows of the full sequence_len)")
    keys.take("pad_to_sequence_len")


def _leftovers(keys: Keys, fields: Mapping[str, Any]) -> None:
    """What axolotl does unasked, and the estimate does not."""
    adapted, quantization = fields.get("lora") is not None, fields.get("quantization")
    if adapted and quantization != "int8" and all(keys.left.get(k) is None for k in KERNELS):
        keys.warn(
            f"{', '.join(KERNELS[:3])} are turned on where they are not set: {OTHER_KERNEL}; set "
            "them to false for the run that is estimated"
        )
    if quantization is not None:
        keys.warn(
            "axolotl turns embeddings, norms and the output head back to 16 bits, which peft's "
            "preparation leaves in fp32: the estimate is high by 2 bytes for each of these"
        )
    plain = fields["attention"] in ("eager", "sdpa")
    if not adapted and plain and fields["dtype"] != "fp32" and not fields.get("deepspeed"):
        keys.warn(
            f"with attention {fields['attention']} axolotl trains embeddings, norms and the output "
            "head in fp32: the estimate, which has them in 16 bits, is low"
        )
    plugins = str(keys.left.get("plugins"))
    if "cut_cross_entropy" in plugins and not keys.left.get("cut_cross_entropy"):
        keys.warn(f"plugins: cut_cross_entropy is not honoured: {LOGITS_SMALLER}")


def _options(keys: Keys) -> Options:
    data = keys.left.get("datasets")
    first = data[0] if isinstance(data, list) and data else None
    path = first.get("path") if isinstance(first, Mapping) else None
    return Options(
        data=path if isinstance(path, str) else None,
        learning_rate=keys.number("learning_rate", None) or None,
        epochs=keys.number("num_epochs", None) or None,
        max_steps=keys.count("max_steps", None),
        output=keys.left.get("output_dir"),
        seed=int(keys.number("seed", 0)) or None,
    )
