"""TrainingArguments as JSON (`args.to_json_string()`), and TRL's, which extend them.

What a key means: transformers 5.17, training_args.py; TRL 1.16, trainer/sft_config.py,
trainer/model_config.py and trainer/sft_trainer.py (SFTTrainer.__init__).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vramplan.errors import IllegalRecipe, UserError
from vramplan.recipe.exchange.deepspeed import with_deepspeed
from vramplan.recipe.exchange.keys import LOGITS_SMALLER, Keys
from vramplan.recipe.exchange.result import Imported, Options
from vramplan.recipe.exchange.trainer_keys import (
    HARMLESS,
    TRL_HARMLESS,
    TRL_OWN,
    TRL_UNMODELLED,
    UNMODELLED,
)
from vramplan.recipe.recipe import ALL_LINEAR, Recipe

DTYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}
TRL_LENGTH = 1024
"""SFTConfig's max_length."""


def read(values: Mapping[str, Any], name: str, folder: str = ".") -> Imported:
    """A run by TrainingArguments, or by TRL's SFTConfig with its ModelConfig.

    Raises UserError: wrong values, or a run that is not modelled.
    """
    keys = Keys(values, name)
    trl = bool(TRL_OWN & values.keys())
    model = keys.text("model_name_or_path")
    fields = trainer(keys, checkpointing=trl, bf16=trl)
    if trl:
        fields |= _trl(keys, fields)
    else:
        keys.warn(
            "TrainingArguments say nothing of "
            + ("" if model else "the model, ")
            + "the sequence length, the weights' dtype, attention, quantization and LoRA: they are "
            "as the options say, or their defaults"
        )
    fields = with_deepspeed(keys, fields, folder)
    options = trainer_options(keys)
    keys.finish(
        {**UNMODELLED, **(TRL_UNMODELLED if trl else {})},
        HARMLESS | (TRL_HARMLESS if trl else frozenset()),
    )
    return Imported(
        kind="trl" if trl else "training-arguments",
        model=model,
        recipe=made(fields, name),
        options=options,
        warnings=tuple(keys.warnings),
        quiet=tuple(keys.quiet),
    )


def made(fields: Mapping[str, Any], name: str) -> Recipe:
    """The recipe; what it refuses is told with the file's name."""
    try:
        return Recipe.from_dict(fields)
    except UserError as error:
        kind = IllegalRecipe if isinstance(error, IllegalRecipe) else UserError
        raise kind(f"{name}: {error}") from error


def trainer(keys: Keys, *, checkpointing: bool = False, bf16: bool = False) -> dict[str, Any]:
    """Recipe's fields of what TrainingArguments say; the keywords are a subclass's defaults."""
    if keys.take("fsdp"):
        raise IllegalRecipe(
            f"{keys.name}: fsdp can't be estimated: FSDP is not modelled; deepspeed's stage 3 "
            "shards as much"
        )
    fp16 = keys.flag("fp16")
    bf16 = keys.flag("bf16", bf16 and not fp16)
    if fp16 and bf16:
        raise IllegalRecipe(f"{keys.name}: fp16 and bf16 are both true: Trainer refuses")
    precision = "fp16" if fp16 else "bf16" if bf16 else "no"
    optimizer = keys.optimizer("optim", "adamw_torch_fused")
    return {
        "mixed_precision": precision,
        "gradient_checkpointing": checkpoints(keys, checkpointing),
        "optimizer": optimizer,
        **projected(keys, optimizer),
        "batch_size": keys.count("per_device_train_batch_size", 8),
        "gradient_accumulation_steps": keys.count("gradient_accumulation_steps", 1),
    }


def checkpoints(keys: Keys, default: bool) -> bool:
    """gradient_checkpointing; reentrant ones are estimated as non-reentrant, and told of."""
    on = keys.flag("gradient_checkpointing", default)
    if keys.table("gradient_checkpointing_kwargs").get("use_reentrant") and on:
        keys.warn("use_reentrant: true is estimated as non-reentrant checkpointing")
    return on


def projected(keys: Keys, optimizer: str) -> dict[str, Any]:
    """Of GaLore and APOLLO: whose gradients are projected, and to what rank."""
    targets = keys.take("optim_target_modules")
    arguments = keys.take("optim_args")
    found: dict[str, Any] = {}
    if not optimizer.startswith(("galore", "apollo")):
        return found
    if targets:
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        every = len(names) == 1 and str(names[0]).replace("_", "-") == ALL_LINEAR
        found["optim_target_modules"] = ALL_LINEAR if every else names
    if isinstance(arguments, str):
        pairs = (part.partition("=") for part in arguments.split(","))
        arguments = {key.strip(): value.strip() for key, _, value in pairs}
    if isinstance(arguments, Mapping) and str(arguments.get("rank", "")).isdigit():
        found["optim_rank"] = int(arguments["rank"])
    return found


def trainer_options(keys: Keys) -> Options:
    """What costs no memory."""
    epochs = float(keys.number("num_train_epochs", 0))
    steps = keys.number("max_steps", -1)
    return Options(
        learning_rate=keys.number("learning_rate", None) or None,
        epochs=epochs if epochs > 0 else None,
        max_steps=int(steps) if steps > 0 else None,
        output=keys.left.get("output_dir"),
        seed=int(keys.number("seed", 0)) or None,
    )


def _trl(keys: Keys, fields: Mapping[str, Any]) -> dict[str, Any]:
    """sft_trainer.py, SFTTrainer.__init__: the model and its adapters."""
    own = Keys(
        {
            **keys.table("model_init_kwargs"),
            **{
                k: keys.take(k)
                for k in ("dtype", "torch_dtype", "attn_implementation")
                if keys.left.get(k) is not None
            },
        },
        keys.name,
    )
    dtype = str(own.take("dtype") or own.take("torch_dtype") or "float32").removeprefix("torch.")
    keys.take("torch_dtype")
    if dtype not in DTYPES:
        keys.warn(f"dtype: {dtype} is the checkpoint's own: estimated as bf16")
    attention = own.choice(
        "attn_implementation",
        {name: name for name in ("eager", "sdpa", "flash_attention_2")}
        | {"flash_attention_3": "flash_attention_2"},
        "sdpa",
    )
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    kind = keys.take("bnb_4bit_quant_type", "nf4")
    nested = keys.flag("use_bnb_nested_quant")
    length = keys.count("max_length", None) or keys.count("max_seq_length", None)
    keys.take("max_seq_length")
    packing = keys.left.get("packing")
    if not packing:
        keys.quiet.append("packing (estimated for rows of the full max_length)")
    keys.warn(f"TRL computes its loss in chunks (1.16): {LOGITS_SMALLER}")
    quantization = str(kind) if four else "int8" if eight else None
    if quantization:
        keys.warn(
            "TRL leaves embeddings, norms and the output head in 16 bits, which peft's preparation "
            "turns to fp32: the estimate is high by 2 bytes for each of these"
        )
    return {
        "dtype": DTYPES.get(dtype, "bf16"),
        "attention": attention,
        "seq_len": length or TRL_LENGTH,
        "quantization": quantization,
        "double_quant": nested if four else True,
        "lora": _trl_lora(keys, quantized=quantization is not None),
    }


def _trl_lora(keys: Keys, *, quantized: bool) -> dict[str, Any] | None:
    rank, alpha = keys.count("lora_r", 16), keys.number("lora_alpha", 32.0)
    dropout, targets = keys.number("lora_dropout", 0.05), keys.names("lora_target_modules")
    if not keys.flag("use_peft"):
        return None
    if not targets:
        raise UserError(
            f"{keys.name}: use_peft without lora_target_modules: peft chooses them by the model's "
            "family; name them, or all-linear"
        )
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": ALL_LINEAR if targets == (ALL_LINEAR,) else targets,
        "dtype": "bf16" if quantized else "fp32",
    }
