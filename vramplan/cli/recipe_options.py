"""A recipe on the command line: an option for each field of Recipe and LoRA, in their own terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vramplan.recipe.recipe import Recipe

# Names and values are judged by Recipe: its errors are the same on the command line, in a recipe
# file and in Python, and importing it for --help would cost more than the help.
_FIELDS = (
    click.option(
        "--dtype", metavar="NAME", help="The weights as loaded: bf16, fp16 or fp32. [bf16]"
    ),
    click.option("--mixed-precision", metavar="NAME", help="Autocast: no, bf16 or fp16. [bf16]"),
    click.option(
        "--quantization", metavar="NAME", help="int8, nf4, fp4 (with LoRA), or none. [none]"
    ),
    click.option(
        "--double-quant/--no-double-quant",
        default=None,
        help="Of nf4 and fp4: quantize their scales too. [yes]",
    ),
    click.option(
        "--lora/--no-lora", default=None, help="Train adapters; any --lora-... implies it. [no]"
    ),
    click.option("--lora-rank", metavar="N", help="LoraConfig's r. [16]"),
    click.option("--lora-alpha", type=float, help="Costs no memory. [twice the rank]"),
    click.option("--lora-dropout", type=float, help="Above 0 it costs memory. [0.05]"),
    click.option("--lora-targets", metavar="NAMES", help="q_proj,v_proj or so. [all-linear]"),
    click.option("--lora-dtype", metavar="NAME", help="The adapters' own. [fp32]"),
    click.option("--attention", metavar="NAME", help="eager, sdpa or flash_attention_2. [sdpa]"),
    click.option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        default=None,
        help="Recompute each layer in backward. [no]",
    ),
    click.option(
        "--optimizer", "--optim", metavar="NAME", help="transformers' optim. [adamw_torch_fused]"
    ),
    click.option(
        "--optim-target-modules", metavar="NAMES", help="Of galore_... and apollo_.... [all-linear]"
    ),
    click.option("--optim-rank", metavar="N", help="Of the same: optim_args' rank. [128]"),
    click.option("--batch-size", metavar="N", help="per_device_train_batch_size. [1]"),
    click.option("--seq-len", metavar="N", help="Tokens a sequence, such as 4096 or 4k. [2048]"),
    click.option("--gradient-accumulation-steps", metavar="N", help="Micro-batches to a step. [1]"),
    click.option("--zero", metavar="STAGE", help="DeepSpeed's ZeRO stage, 0 to 3, or no. [no]"),
    click.option(
        "--offload-optimizer", metavar="NAME", help="Of --zero: cpu, nvme or none. [none]"
    ),
    click.option("--offload-param", metavar="NAME", help="Of --zero 3: cpu, nvme or none. [none]"),
    click.option("--nvme-path", metavar="DIR", help="The folder for what is offloaded to nvme."),
    click.option("--deepspeed", metavar="FILE", help="A ds_config.json; options override it."),
    click.option(
        "--world-size", metavar="N", help="GPUs that train together. [those of --gpu, with --zero]"
    ),
    click.option(
        "--allocator", metavar="NAME", help="expandable_segments or default. [expandable_segments]"
    ),
)
_NONE = ("none", "no")
_COUNTS = (
    *("batch_size", "seq_len", "gradient_accumulation_steps", "lora_rank", "optim_rank"),
    "world_size",
)


def recipe_options(function: Any) -> Any:
    """Decorates a command; its callback gets a keyword argument a field, None where not given."""
    for option in reversed(_FIELDS):
        function = option(function)
    return function


def recipe_of(
    file: str | None,
    given: dict[str, Any],
    cards: int | None = None,
    base: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of the file, or the default, with the options that were given.

    `cards`: how many were named; a ds_config.json's batch has to agree with them. `base` is a
    recipe's fields, where they come from no recipe file.
    """
    from vramplan.recipe.recipe import Recipe
    from vramplan.units import parse_count

    chosen = {name: value for name, value in given.items() if value is not None}
    for name in _COUNTS:
        if name in chosen:
            chosen[name] = parse_count(chosen[name], thing=name.replace("lora_", "lora."))
    if chosen.get("quantization", "").lower() in _NONE:
        chosen["quantization"] = None
    if "optim_target_modules" in chosen:
        chosen["optim_target_modules"] = _names(chosen["optim_target_modules"])
    if file is None:
        values: dict[str, Any] = dict(base or {})
    else:
        from vramplan.recipe.files import read_recipe

        values = read_recipe(file).to_dict()
    ds_config = chosen.pop("deepspeed", None)
    if ds_config is not None:
        from vramplan.recipe.ds_merge import merged

        values, warnings = merged(ds_config, values, chosen, cards)
        for warning in warnings:
            click.echo(f"Warning: {warning}", err=True)
    adapters = _adapters(chosen, values.get("lora"))
    zero = _zero(chosen, values.get("deepspeed"))
    return Recipe.from_dict({**values, **chosen, "lora": adapters, "deepspeed": zero})


def _zero(chosen: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any] | None:
    """DeepSpeed's fields, taken out of `chosen`; None without DeepSpeed."""
    stage = chosen.pop("zero", None)
    offload = {
        name: None if chosen[name].lower() in _NONE else chosen[name]
        for name in ("offload_optimizer", "offload_param")
        if chosen.get(name) is not None
    }
    for name in offload:
        del chosen[name]
    path = chosen.pop("nvme_path", None)
    if (stage is None and base is None) or (stage is not None and stage.lower() in _NONE):
        if any(offload.values()) or path is not None:
            from vramplan.errors import IllegalRecipe

            given = [*(name for name in offload if offload[name]), "nvme_path"]
            option = given[0].replace("_", "-")
            stages = "--zero 1, 2 or 3" if option == "offload-optimizer" else "--zero 3"
            raise IllegalRecipe(f"--{option} without ZeRO: add {stages}")
        return None
    fields = {**(base or {}), **offload, **({} if path is None else {"nvme_path": path})}
    if stage is not None:
        fields["stage"] = int(stage) if stage.isdigit() else stage
    return fields


def _names(text: str) -> str | tuple[str, ...]:
    """q_proj,v_proj or so."""
    names = tuple(name for name in (part.strip() for part in text.split(",")) if name)
    return names[0] if len(names) == 1 else names


def _adapters(chosen: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any] | None:
    """LoRA's fields, taken out of `chosen`; None for full fine-tuning."""
    wanted = chosen.pop("lora", None)
    fields = {
        name.removeprefix("lora_"): chosen.pop(name)
        for name in tuple(chosen)
        if name.startswith("lora_")
    }
    if "targets" in fields:
        fields["target_modules"] = _names(fields.pop("targets"))
    if wanted is False:
        if fields:
            from vramplan.errors import IllegalRecipe

            raise IllegalRecipe("--no-lora with options of LoRA: leave one or the other out")
        return None
    if wanted is None and not fields and base is None:
        return None
    return {**(base or {}), **fields}
