"""What stands beside ds_config.json: accelerate's config, TrainingArguments, the reasons."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from vramplan.errors import UserError
from vramplan.recipe.recipe import Recipe
from vramplan_launcher.deepspeed_config import Config, Hyperparameters

CONFIG, ACCELERATE = "ds_config.json", "accelerate_config.yaml"
ARGUMENTS, REASONS = "training_arguments.py", "REASONS.md"


def contents(
    config: Config, hyper: Hyperparameters, folder: Path, *, machines: int = 1, title: str
) -> dict[str, str]:
    """The files for `folder`, by name. Raises UserError."""
    return {
        CONFIG: json.dumps(config.values, indent=2) + "\n",
        ACCELERATE: accelerate_config(config.recipe, (folder / CONFIG).as_posix(), machines),
        ARGUMENTS: training_arguments(config.recipe, hyper),
        REASONS: reasons_page(config, title),
    }


def accelerate_config(recipe: Recipe, file: str = CONFIG, machines: int = 1) -> str:
    """The YAML for `accelerate launch --config_file`; `file` is where ds_config.json is.

    Batch, precision, stage and offload are ds_config.json's: accelerate 1.15 refuses a config that
    has them beside a deepspeed_config_file (utils/launch.py).

    Raises UserError for a number of machines that does not divide the ranks.
    """
    ranks = recipe.world_size
    if machines < 1 or ranks % machines:
        raise UserError(
            f"machines is {machines}, for {ranks} GPU{'s' if ranks > 1 else ''} in all: accelerate "
            "starts equally many on each. Give a number of machines, of at least 1, that divides "
            "them"
        )
    assert recipe.deepspeed is not None
    lines = [
        "# accelerate launch --config_file accelerate_config.yaml train.py",
        "# deepspeed_config_file is read from the folder in which accelerate is started.",
    ]
    if machines > 1:
        lines.append("# On each machine add --machine_rank N --main_process_ip ADDRESS.")
    lines += [
        "compute_environment: LOCAL_MACHINE",
        "debug: false",
        "deepspeed_config:",
        f"  deepspeed_config_file: {json.dumps(file)}",
        f"  zero3_init_flag: {_yaml(recipe.deepspeed.stage == 3)}",
    ]
    if machines > 1:
        lines.append("  deepspeed_multinode_launcher: standard")
    lines += [
        "distributed_type: DEEPSPEED",
        "downcast_bf16: 'no'",
        "enable_cpu_affinity: false",
        "machine_rank: 0",
        "main_training_function: main",
        f"num_machines: {machines}",
        f"num_processes: {ranks}",
        "rdzv_backend: static",
        "same_network: true",
        "use_cpu: false",
    ]
    return "\n".join(lines) + "\n"


def training_arguments(recipe: Recipe, hyper: Hyperparameters = Hyperparameters()) -> str:  # noqa: B008
    """Python source: a function that makes the TrainingArguments of this run."""
    settings: dict[str, object] = {
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "bf16": recipe.mixed_precision == "bf16",
        "fp16": recipe.mixed_precision == "fp16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "optim": recipe.optimizer,
        **asdict(hyper),
    }
    if recipe.gradient_checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    body = "".join(f'    "{name}": {_python(value)},\n' for name, value in settings.items())
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[recipe.dtype]
    more = _beside(recipe)
    conf = ""
    if recipe.allocator == "expandable_segments":
        conf = "Start it with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.\n"
    early = "before the model: stage 3 partitions weights as they are made.\n"
    first = f"Make the arguments {early}" if _stage(recipe) == 3 else ""
    return f'''"""TrainingArguments for the ds_config.json beside this file.

Written by `vramplan config`.
{first}Load the model with dtype=torch.{dtype} and attn_implementation="{recipe.attention}"{more}.
{conf}Trainer refuses values that differ from ds_config.json's: change both.
"""

from pathlib import Path

from transformers import TrainingArguments

DEEPSPEED = Path(__file__).resolve().with_name("{CONFIG}")
SETTINGS = {{
{body}}}


def training_arguments(output_dir, **more):
    """The arguments of this run; `more` goes to TrainingArguments too."""
    settings = {{**SETTINGS, "deepspeed": str(DEEPSPEED), **more}}
    return TrainingArguments(output_dir=output_dir, **settings)
'''


def reasons_page(config: Config, title: str) -> str:
    """Markdown: each value of ds_config.json, and why it is so."""
    lines = [f"# {title}", "", "Why ds_config.json is as it is. JSON has no room for comments.", ""]
    lines += ["| key | value | why |", "|---|---|---|"]
    for key, reason in config.reasons.items():
        lines.append(f"| `{key}` | {value_of(config, key)} | {reason} |")
    return "\n".join(lines) + "\n"


def value_of(config: Config, key: str) -> str:
    """A value as shown beside its reason; of a section what is in it, in short."""
    value: object = config.values
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return "-"
        value = value[name]
    if isinstance(value, dict):
        if "enabled" in value:
            return "auto" if value["enabled"] == "auto" else "on" if value["enabled"] else "off"
        return str(value.get("type", "all off" if not any(value.values()) else "see file"))
    return value if isinstance(value, str) else json.dumps(value)


def _stage(recipe: Recipe) -> int:
    assert recipe.deepspeed is not None
    return recipe.deepspeed.stage


def _beside(recipe: Recipe) -> str:
    """What else the model is made with, for the reader."""
    said = (
        f",\nits linear weights quantized to {recipe.quantization}" if recipe.quantization else ""
    )
    if recipe.lora is not None:
        said += f",\nand give it LoRA adapters of rank {recipe.lora.rank}"
    return said


def _python(value: object) -> str:
    """Python source, with the quotes that formatters like."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {_python(v)}' for k, v in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _yaml(flag: bool) -> str:
    return "true" if flag else "false"
