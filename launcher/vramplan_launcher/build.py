"""The run that an estimate models, built for real: weights, adapters, TrainingArguments.

What a trace builds on fake tensors (trace/build.py) and this are the same calls of transformers and
peft; names and rules that need no fake tensors come from there.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vramplan.errors import UserError
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import Recipe
from vramplan_launcher.job import Job
from vramplan_launcher.trace.build import (
    DTYPES,
    cast_adapters,
    compute_dtype,
    hf_config,
    model_class,
    prepare_for_kbit,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

_DONE = "complete"


# --- where the weights come from ------------------------------------------------------------


def scratch() -> Path:
    """Where random weights are kept: $VRAMPLAN_SCRATCH, else the folder of temporary files.

    A RAM disk (/dev/shm) is quickest.
    """
    given = os.environ.get("VRAMPLAN_SCRATCH")
    if given:
        return Path(given)
    return Path(tempfile.gettempdir()) / f"vramplan-{os.getuid()}"


def random_checkpoint(config: Mapping[str, Any], device: str) -> Path:
    """A checkpoint of the architecture with random bf16 weights, saved once and then read again.

    Loading it is what loading the published one would be: the same files, dtypes and copies. Of
    several ranks the first makes it while the others wait.
    """
    text = json.dumps(config, sort_keys=True)
    folder = scratch() / f"random-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _save_random(dict(config), folder, device)
            (folder / _DONE).touch()
    return folder


def _save_random(config: dict[str, Any], folder: Path, device: str) -> None:
    made = hf_config(config)
    with torch.device("meta"):
        need = 2 * sum(p.numel() for p in model_class(made).from_config(made).parameters())
    if device != "cpu" and need > 0.9 * torch.cuda.mem_get_info(device)[0]:
        device = "cpu"
    _check_room(folder.parent, need)
    with torch.device(device):
        model = model_class(made).from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        from vramplan.units import format_bytes

        raise UserError(
            f"random weights take {format_bytes(need)}, and {folder} has {format_bytes(free)} "
            "left: set VRAMPLAN_SCRATCH to a folder with more room"
        )


# --- the model ------------------------------------------------------------------------------


def load_model(
    source: str | Path, recipe: Recipe, device: str | None, *, trust_remote_code: bool = False
) -> Any:
    """`from_pretrained` as the recipe says. `device`: None under DeepSpeed, which places weights.

    Raises UserError where flash-attn is asked for and not installed.
    """
    from transformers import AutoConfig

    if recipe.attention == "flash_attention_2":
        check_flash_attention()
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    more: dict[str, Any] = {} if device is None else {"device_map": {"": device}}
    config = AutoConfig.from_pretrained(source, **trust)
    return model_class(config).from_pretrained(
        source,
        dtype=DTYPES[recipe.dtype],
        attn_implementation=recipe.attention,
        **_quantization(recipe),
        **more,
        **trust,
    )


def _quantization(recipe: Recipe) -> dict[str, Any]:
    if recipe.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    if recipe.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    made = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization,
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(recipe.to_dict()),
    )
    return {"quantization_config": made}


def check_flash_attention() -> None:
    """Raises UserError, with what to install, where flash-attn is not here."""
    from importlib.util import find_spec

    if find_spec("flash_attn") is None:
        raise UserError(
            "attention flash_attention_2 needs the package flash-attn, which is not installed: "
            "pip install 'vramplan[flash]' --no-build-isolation, or take --attention sdpa, which "
            "needs as much memory"
        )


def prepare_model(model: Any, recipe: Recipe) -> Any:
    """`prepare_model_for_kbit_training` and `get_peft_model`, as the recipe says."""
    if recipe.quantization:
        model = prepare_for_kbit(model, recipe.to_dict())
    if recipe.lora is not None:
        model = _add_lora(model, recipe)
        if recipe.gradient_checkpointing:
            model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def _add_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    assert lora is not None
    targets = lora.target_modules
    alpha: Any = lora.alpha or 2 * lora.rank
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=lora.dtype == "fp32")
    cast_adapters(adapted, DTYPES[lora.dtype])
    return adapted


def trainable(model: Any) -> int:
    """Parameters that get gradients, those that ZeRO partitioned counted whole."""
    found = (p for p in model.parameters() if p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) for p in found)


# --- TrainingArguments ----------------------------------------------------------------------


def deepspeed_values(job: Job, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ds_config of a job, as TrainingArguments takes it; None without DeepSpeed."""
    if job.recipe.deepspeed is None:
        return None
    from vramplan.models.hf_config import architecture
    from vramplan_launcher.deepspeed_config import Hyperparameters, ds_config

    train = job.training
    hyper = Hyperparameters(
        learning_rate=job.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    values = dict(ds_config(architecture(dict(config)), job.recipe, hyper=hyper).values)
    if job.cpu:  # torch's own optimizer: DeepSpeed's would have to be compiled, for no gain here
        values.pop("optimizer", None)
        values |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return values


def on_the_processor(arguments: TrainingArguments) -> None:
    """One name for the device: accelerate calls it "cpu:0" for several ranks (1.15, state.py,
    set_device), which torch.load does not know, so that no checkpoint could be resumed."""
    device = torch.device("cpu")
    arguments.distributed_state.device = arguments.__dict__["_setup_devices"] = device


def join_on_processor() -> None:
    """DeepSpeed's own view of the process group, where Trainer runs on the processor.

    accelerate makes the group there without DeepSpeed (1.15, state.py, PartialState), which would
    then take every rank for the only one. Its collectives through shared memory would have to be
    compiled, and wait for ranks that are only pretended: gloo serves.
    """
    import deepspeed.comm.torch as collectives
    from deepspeed import comm

    collectives.build_shm_op = lambda: None
    if not comm.is_initialized():
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def recipe_arguments(recipe: Recipe, *, cpu: bool = False) -> dict[str, Any]:
    """TrainingArguments of what a recipe says."""
    values: dict[str, Any] = {
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "bf16": recipe.mixed_precision == "bf16",
        "fp16": recipe.mixed_precision == "fp16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "optim": recipe.optimizer,
        "use_cpu": cpu,
    }
    if recipe.gradient_checkpointing:
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if find_optimizer(recipe.optimizer).low_rank is not None:
        targets = recipe.optim_target_modules
        values["optim_target_modules"] = targets if isinstance(targets, str) else list(targets)
        values["optim_args"] = f"rank={recipe.optim_rank}"
    return values
