"""accelerate's YAML: how the processes of a run are started."""

from __future__ import annotations

import json

from vramplan.recipe.exchange.result import Exported, Options
from vramplan.recipe.recipe import Recipe


def accelerate(model: str, recipe: Recipe, options: Options, ds_config: str) -> Exported:
    """What `accelerate launch --config_file` takes (accelerate 1.15, commands/config).

    It says how processes are started; batch, model and optimizer are the script's. accelerate sets
    mixed precision for scripts that make their own Accelerator; Trainer has its own.
    """
    several = recipe.world_size > 1
    kind = "DEEPSPEED" if recipe.deepspeed is not None else "MULTI_GPU" if several else "NO"
    lines = [
        f"# {model}: accelerate launch --config_file FILE train.py",
        *_environment(recipe),
        "compute_environment: LOCAL_MACHINE",
        "debug: false",
    ]
    if recipe.deepspeed is not None:
        third = json.dumps(recipe.deepspeed.stage == 3)
        lines += [
            "deepspeed_config:",
            f"  deepspeed_config_file: {json.dumps(ds_config)}",
            f"  zero3_init_flag: {third}",
        ]
    # A bare NO is false to YAML.
    lines += [
        f"distributed_type: {json.dumps(kind)}",
        "downcast_bf16: 'no'",
        "enable_cpu_affinity: false",
        "machine_rank: 0",
    ]
    if recipe.deepspeed is None:  # accelerate refuses it beside a deepspeed_config_file
        lines.append(f"mixed_precision: {json.dumps(recipe.mixed_precision)}")
    lines += [
        "main_training_function: main",
        "num_machines: 1",
        f"num_processes: {recipe.world_size}",
        "rdzv_backend: static",
        "same_network: true",
        "use_cpu: false",
    ]
    note = (
        "accelerate's config says how processes are started; the batch, the optimizer, LoRA and "
        "the model are the training script's (--to training-arguments, --to trl)"
    )
    return Exported(text="\n".join(lines) + "\n", notes=(note,))


def _environment(recipe: Recipe) -> list[str]:
    if recipe.allocator != "expandable_segments":
        return []
    return ["# export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
