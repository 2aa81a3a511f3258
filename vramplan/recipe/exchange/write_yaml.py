"""Axolotl's and LLaMA-Factory's YAML, written from a recipe.

What a key means there is told where each is read: axolotl.py, llama_factory.py.
"""

from __future__ import annotations

import json
from typing import Any

from vramplan.errors import IllegalRecipe
from vramplan.recipe.exchange.axolotl import KERNELS
from vramplan.recipe.exchange.result import Exported, Options
from vramplan.recipe.recipe import ALL_LINEAR, Recipe

DATA = "data.jsonl"
"""Where nothing else is known."""
_ENDINGS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
RATES = {"lora": 2e-4, "full": 2e-5}
"""Learning rates where none is given: peft's QLoRA example, and common for full fine-tuning."""
_SIXTEEN_BITS = (
    "{tool} leaves embeddings, norms and the output head in 16 bits, which peft's preparation "
    "turns to fp32: it needs 2 bytes less than estimated for each of these"
)


def axolotl(model: str, recipe: Recipe, options: Options, ds_config: str) -> Exported:
    """Axolotl 0.18's YAML. Raises IllegalRecipe for what it has no words for."""
    notes: list[str] = []
    keys: dict[str, Any] = {"base_model": model, **_axolotl_precision(recipe)}
    keys |= _axolotl_method(recipe, notes)
    # sdpa and eager keep packed rows apart by a mask of s x s, which is not what is estimated.
    packed = recipe.attention == "flash_attention_2"
    keys |= {
        "attn_implementation": recipe.attention,
        "sequence_len": recipe.seq_len,
        "sample_packing": packed,
        "pad_to_sequence_len": True,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "gradient_checkpointing": recipe.gradient_checkpointing,
    }
    if recipe.gradient_checkpointing:
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    keys |= _optimizer(recipe, "optimizer")
    if recipe.deepspeed is not None:
        keys["deepspeed"] = ds_config
    if not packed:
        notes.append(
            "rows are padded to sequence_len with an attention mask, not packed: for kernels that "
            "read a mask memory is not estimated; flash_attention_2 packs"
        )
    if recipe.lora is None and not packed and recipe.dtype != "fp32" and recipe.deepspeed is None:
        notes.append(
            f"with attention {recipe.attention} axolotl trains embeddings, norms and the output "
            "head in fp32: it needs more than estimated; flash_attention_2 does not"
        )
    keys |= {
        "datasets": [_dataset(options.data or DATA)],
        "learning_rate": _rate(recipe, options),
        "num_epochs": options.epochs or 1,
        "max_steps": options.max_steps,
        "output_dir": options.output or "outputs",
        "seed": options.seed,
    }
    return _exported("Axolotl: axolotl train FILE", recipe, keys, notes)


def _dataset(data: str) -> dict[str, str]:
    kind = next((kind for ending, kind in _ENDINGS.items() if data.endswith(ending)), None)
    local = {} if kind is None else {"ds_type": kind}
    return {"path": data, **local, "type": "chat_template"}


def _axolotl_precision(recipe: Recipe) -> dict[str, Any]:
    found = {
        ("bf16", "bf16"): {"bf16": True},
        ("fp16", "fp16"): {"bf16": False, "fp16": True},
        ("fp16", "no"): {"bf16": False, "float16": True},
        ("fp32", "no"): {"bf16": False, "fp16": False},
    }
    made = found.get((recipe.dtype, recipe.mixed_precision))
    if made is None or (recipe.dtype == "fp32" and recipe.quantization == "int8"):
        raise IllegalRecipe(
            f"Axolotl has no words for dtype {recipe.dtype!r} with mixed_precision "
            f"{recipe.mixed_precision!r}: it has bf16 with bf16, fp16 with fp16 or no, and fp32 "
            "with no (but with load_in_8bit, which is then over fp16)"
        )
    return made


def _axolotl_method(recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    lora = recipe.lora
    if lora is None:
        return {}
    if recipe.quantization is not None:
        notes.append(_SIXTEEN_BITS.format(tool="Axolotl"))
    four = recipe.quantization in ("nf4", "fp4")
    keys: dict[str, Any] = {
        "adapter": "qlora" if four else "lora",
        "load_in_4bit": four,
        "load_in_8bit": recipe.quantization == "int8",
        "lora_r": lora.rank,
        "lora_alpha": _alpha(recipe),
        "lora_dropout": lora.dropout,
    }
    if four and (recipe.quantization, recipe.double_quant) != ("nf4", True):
        keys["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": recipe.quantization,
            "bnb_4bit_use_double_quant": recipe.double_quant,
        }
    if lora.target_modules == ALL_LINEAR:
        keys["lora_target_linear"] = True
    else:
        keys["lora_target_modules"] = list(lora.target_modules)
    if lora.dtype == recipe.dtype != "fp32" and recipe.quantization != "int8":
        keys["peft_autocast_adapter_dtype"] = False
    elif lora.dtype != "fp32":
        own = "" if recipe.quantization == "int8" else f"{recipe.dtype} or "
        notes.append(f"adapters are {own}fp32 in Axolotl, not {lora.dtype}")
    # On unless they are turned off, and not what is estimated.
    return keys | dict.fromkeys(KERNELS, False)


def llama_factory(model: str, recipe: Recipe, options: Options, ds_config: str) -> Exported:
    """LLaMA-Factory 0.9.6's YAML. Raises IllegalRecipe for what it has no words for."""
    notes: list[str] = []
    keys: dict[str, Any] = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if recipe.lora is None else "lora",
        **_factory_precision(recipe),
    }
    if recipe.lora is not None:
        targets = recipe.lora.target_modules
        keys |= {
            "lora_rank": recipe.lora.rank,
            "lora_alpha": _alpha(recipe),
            "lora_dropout": recipe.lora.dropout,
            "lora_target": "all" if targets == ALL_LINEAR else ",".join(targets),
        }
    if recipe.quantization is not None:
        notes.append(_SIXTEEN_BITS.format(tool="LLaMA-Factory"))
        keys |= {"quantization_bit": 8 if recipe.quantization == "int8" else 4}
        keys |= {"quantization_method": "bnb"}
    if recipe.quantization in ("nf4", "fp4"):
        keys |= {"quantization_type": recipe.quantization}
        keys |= {"double_quantization": recipe.double_quant}
    flash = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}
    keys |= {
        "flash_attn": flash[recipe.attention],
        "disable_gradient_checkpointing": not recipe.gradient_checkpointing,
        "use_reentrant_gc": False if recipe.gradient_checkpointing else None,
        "cutoff_len": recipe.seq_len,
        "packing": True,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        **_optimizer(recipe, "optim"),
        "deepspeed": ds_config if recipe.deepspeed is not None else None,
        "dataset": options.data or "alpaca_en_demo",
        "template": "default",
        "learning_rate": _rate(recipe, options),
        "num_train_epochs": options.epochs or 1,
        "max_steps": options.max_steps,
        "output_dir": options.output or "outputs",
        "seed": options.seed,
    }
    notes.append("dataset is a name in data/dataset_info.json, and template the model's: set both")
    force = "FORCE_TORCHRUN=1 " if recipe.deepspeed is not None else ""
    return _exported(f"LLaMA-Factory: {force}llamafactory-cli train FILE", recipe, keys, notes)


def _factory_precision(recipe: Recipe) -> dict[str, Any]:
    """The reverse of llama_factory._dtype."""
    dtype, precision, lora = recipe.dtype, recipe.mixed_precision, recipe.lora
    engine = recipe.deepspeed is not None
    flags = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    refused = IllegalRecipe(
        f"LLaMA-Factory has no words for dtype {dtype!r} with mixed_precision {precision!r}"
        + (f" and adapters of {lora.dtype}" if lora is not None else "")
        + ": weights are loaded in the dtype of mixed precision, and what is trained is fp32, or "
        "bf16 with pure_bf16"
    )
    if lora is None:
        if dtype == "fp32" and not engine:
            return flags
        if dtype == precision and engine:
            return flags
        if dtype == "bf16" and not engine:
            return {"pure_bf16": True, **flags}
        raise refused
    loaded = precision if precision != "no" else "bf16"
    if dtype == loaded and lora.dtype == "fp32":
        return flags
    if dtype == lora.dtype == "bf16":
        return {"pure_bf16": True, **flags}
    raise refused


# --- shared -----------------------------------------------------------------------------------


def _alpha(recipe: Recipe) -> float:
    assert recipe.lora is not None
    alpha = recipe.lora.alpha if recipe.lora.alpha is not None else 2 * recipe.lora.rank
    return int(alpha) if alpha == int(alpha) else alpha


def _rate(recipe: Recipe, options: Options) -> float:
    return options.learning_rate or RATES["full" if recipe.lora is None else "lora"]


def _optimizer(recipe: Recipe, key: str) -> dict[str, Any]:
    keys: dict[str, Any] = {key: recipe.optimizer}
    if recipe.optimizer.startswith(("galore", "apollo")):
        targets = recipe.optim_target_modules
        keys["optim_target_modules"] = targets if isinstance(targets, str) else list(targets)
        keys["optim_args"] = f"rank={recipe.optim_rank}"
    return keys


def _exported(title: str, recipe: Recipe, keys: dict[str, Any], notes: list[str]) -> Exported:
    head = [title]
    if recipe.world_size > 1:
        head.append(f"On {recipe.world_size} GPUs.")
    if recipe.allocator == "expandable_segments":
        head.append("export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    head += [f"Note: {note}." for note in notes]
    body = [f"{key}:{_yaml(value)}" for key, value in keys.items() if value is not None]
    text = "".join(f"{line}\n" for line in [*(f"# {line}" for line in head), *body])
    return Exported(text=text, notes=tuple(notes))


def _yaml(value: Any) -> str:
    """A value in YAML: JSON, which YAML contains, but for lists of tables and plain words."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = []
        for entry in value:
            pairs = [f"{key}:{_yaml(inner)}" for key, inner in entry.items()]
            rows.append("\n  - " + "\n    ".join(pairs))
        return "".join(rows)
    if isinstance(value, float) and value != int(value):
        # 2e-05 is a text to YAML 1.1, which wants a dot.
        text = repr(value)
        return f" {text if '.' in text else text.replace('e', '.0e')}"
    return f" {json.dumps(value)}"
