"""ds_config.json from a recipe: every value explicit, and a reason for each. Needs no torch.

Keys, defaults and what reads them: DeepSpeed 0.19.8, runtime/config.py, runtime/zero/config.py,
runtime/precision_config.py, runtime/engine.py. Trainer 5.17 compares the batch, the precision,
gradient_clipping and the optimizer's params with TrainingArguments, and refuses a mismatch
(integrations/deepspeed.py, HfTrainerDeepSpeedConfig.fill_match).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from vramplan.errors import IllegalRecipe, InvalidValue
from vramplan.hardware.gpu import Gpus
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import AUTO, DeepSpeed
from vramplan.recipe.ds_config import counts_in
from vramplan.recipe.ds_keys import FIELDS
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import Recipe
from vramplan.units import format_bytes
from vramplan_launcher.deepspeed_sizes import Sizes, sized

ZERO = "zero_optimization"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """What ds_config.json and TrainingArguments both hold. Defaults are TrainingArguments'."""

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < inf:
                raise InvalidValue(name, value, "a number of at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A ds_config.json, and why it is so."""

    values: dict[str, Any]
    reasons: dict[str, str]
    """A dotted key, or a section's, and one sentence; in the order of the file."""
    recipe: Recipe
    """The run as written: no "auto" in it. Estimate this one."""
    required: int | None
    """Bytes of a card that the run needs; None where no cards were given."""
    available: int | None


def ds_config(
    arch: Architecture,
    recipe: Recipe,
    *,
    gpus: Gpus | None = None,
    hf_auto: bool = False,
    hyper: Hyperparameters = Hyperparameters(),
) -> Config:
    """The config of `recipe`, which must have `deepspeed`.

    With `gpus` the sizes that the recipe leaves open are chosen for what memory is left; without,
    they are transformers' "auto" in figures. `hf_auto` writes "auto" wherever transformers would
    fill in the very value.

    Raises IllegalRecipe: no DeepSpeed, or what the model can't be run with.
    """
    if recipe.deepspeed is None:
        raise IllegalRecipe(
            "the recipe is without DeepSpeed, so there is no ds_config.json to write: add a ZeRO "
            "stage (--zero 0, 1, 2 or 3)"
        )
    sizes = sized(arch, recipe, gpus)
    writer = _Writer(sizes, hyper)
    writer.batch()
    writer.precision()
    writer.zero()
    writer.optimizer()
    writer.rest()
    if hf_auto:
        _leave_to_transformers(writer, arch)
    return Config(
        values=writer.values,
        reasons=writer.reasons,
        recipe=sizes.recipe,
        required=sizes.required,
        available=sizes.available,
    )


class _Writer:
    """Values and reasons, section by section."""

    def __init__(self, sizes: Sizes, hyper: Hyperparameters) -> None:
        self.sizes, self.recipe, self.hyper = sizes, sizes.recipe, hyper
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def put(self, key: str, value: Any, reason: str) -> None:
        """A dotted key's value. Sections come into being with their first key."""
        table = self.values
        *sections, last = key.split(".")
        for name in sections:
            table = table.setdefault(name, {})
        table[last] = value
        if reason:
            self.reasons[key] = reason

    def batch(self) -> None:
        micro, ranks = self.recipe.batch_size, self.recipe.world_size
        steps = self.recipe.gradient_accumulation_steps
        self.put(
            "train_batch_size",
            micro * steps * ranks,
            f"{micro} a GPU x {steps} micro-batches x {ranks} GPUs: DeepSpeed refuses another "
            "product",
        )
        self.put("train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size")
        self.put("gradient_accumulation_steps", steps, "TrainingArguments' of the same name")
        self.put(
            "gradient_clipping",
            self.hyper.max_grad_norm,
            "max_grad_norm: DeepSpeed clips, Trainer does not",
        )

    def precision(self) -> None:
        mixed = self.recipe.mixed_precision
        none = "fp32 engine: weights, gradients and states in 32 bits"
        self.put(
            "bf16",
            {
                "enabled": mixed == "bf16",
                "immediate_grad_update": False,
                "check_grad_overflow": True,
                "bf16_master_weights_and_grads": False,
                "bf16_optimizer_states": False,
            },
            "16-bit weights, fp32 masters and states; no loss scale is needed"
            if mixed == "bf16"
            else none
            if mixed == "no"
            else "off: fp16 is on, and DeepSpeed refuses both",
        )
        self.put(
            "fp16",
            {
                "enabled": mixed == "fp16",
                "auto_cast": False,
                "loss_scale": 0,
                "initial_scale_power": 16,
                "loss_scale_window": 1000,
                "hysteresis": 2,
                "consecutive_hysteresis": False,
                "min_loss_scale": 1,
                "fp16_master_weights_and_grads": False,
            },
            "loss_scale 0 is a dynamic scale: from 2^16, doubled after 1000 steps without "
            "overflow, halved after the second step with one"
            if mixed == "fp16"
            else none
            if mixed == "no"
            else "off: bf16 is on, and DeepSpeed refuses both",
        )

    def zero(self) -> None:
        zero, reasons = self.sizes.zero, self.sizes.reasons
        self.put(f"{ZERO}.stage", zero.stage, _STAGES[zero.stage])
        self._offload(zero)
        for name in counts_in(zero):
            key = FIELDS[name]
            if "." not in key and name not in ("stage", "offload_optimizer", "offload_param"):
                reason = reasons.get(name) or _REASONS.get(name, "DeepSpeed's default")
                self.put(f"{ZERO}.{key}", getattr(zero, name), reason)
        if zero.stage == 3:
            self.put(
                f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
                True,
                "save_model writes whole weights: without, only partitions. Rank 0 gathers them "
                "in host memory",
            )
        elif zero.stage:
            self.put(
                f"{ZERO}.allgather_partitions",
                True,
                "one collective brings the stepped weights back, where false broadcasts each "
                "rank's",
            )

    def _offload(self, zero: DeepSpeed) -> None:
        """What is asked of the host, or of NVMe."""
        pins = {
            "offload_optimizer": zero.pin_memory,
            "offload_param": zero.pin_memory
            if zero.pin_param_memory is None
            else zero.pin_param_memory,
        }
        where = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_param}
        for name, device in where.items():
            if device is None:
                continue
            key = f"{ZERO}.{name}"
            self.put(f"{key}.device", device, _OFFLOADED[name])
            pin = pins[name]
            host = self.sizes.host
            self.put(
                f"{key}.pin_memory",
                pin,
                f"{_PINNED}: {format_bytes(host.pinned)} on the host of each rank"
                if pin
                else f"{_PAGEABLE}: {format_bytes(host.pageable)} on the host of each rank",
            )
            if device == "nvme":
                self.put(f"{key}.nvme_path", zero.nvme_path, "as the recipe says")
                for field in counts_in(zero):
                    if FIELDS[field].startswith(f"{name}.") and field in _NVME:
                        reason = self.sizes.reasons.get(field) or _NVME[field]
                        self.put(f"{ZERO}.{FIELDS[field]}", getattr(zero, field), reason)

    def optimizer(self) -> None:
        optimizer = find_optimizer(self.recipe.optimizer)
        offloaded = self.sizes.zero.offload_optimizer is not None
        h = self.hyper
        params: dict[str, Any] = {"lr": h.learning_rate, "weight_decay": h.weight_decay}
        if optimizer.package == "torch" and optimizer.algorithm == "adamw":
            params |= {"betas": [h.adam_beta1, h.adam_beta2], "eps": h.adam_epsilon}
            self.put(
                "optimizer",
                {"type": "AdamW", "params": params},
                ("DeepSpeedCPUAdam steps on the host" if offloaded else "DeepSpeed's FusedAdam")
                + ": one kernel for all parameters, no temporaries; it is compiled at first use "
                + ("(g++, ninja). " if offloaded else "(nvcc, ninja). ")
                + "The params are TrainingArguments'. Weight decay counts for norms and biases too",
            )
        elif optimizer.algorithm == "adagrad":
            self.put(
                "optimizer",
                {"type": "Adagrad", "params": params},
                "made by DeepSpeed: it remakes an Adagrad with one group of parameters, and fails "
                "on Trainer's, which has two (runtime/zero/stage_1_and_2.py, "
                "initialize_optimizer_states)",
            )
        else:
            self.put(
                "zero_allow_untested_optimizer",
                True,
                f"no optimizer section: Trainer makes {self.recipe.optimizer}, which DeepSpeed has "
                "not tested with ZeRO",
            )
        if offloaded:
            own = "optimizer" in self.values
            self.put(
                "zero_force_ds_cpu_optimizer",
                own,
                "the optimizer section means DeepSpeed's own, for the CPU"
                if own
                else f"{self.recipe.optimizer} steps on the host itself: true would put Adam in "
                "its place",
            )

    def rest(self) -> None:
        self.put(
            "activation_checkpointing",
            {
                "partition_activations": False,
                "cpu_checkpointing": False,
                "contiguous_memory_optimization": False,
                "number_checkpoints": None,
                "synchronize_checkpoint_boundary": False,
                "profile": False,
            },
            "DeepSpeed's own, which transformers' models don't call: gradient_checkpointing in "
            f"TrainingArguments is {self.recipe.gradient_checkpointing}",
        )
        if "nvme" in (self.sizes.zero.offload_optimizer, self.sizes.zero.offload_param):
            self.put("aio", dict(_AIO), "DeepSpeed's defaults; ds_nvme_tune finds a drive's own")
        self.put("wall_clock_breakdown", False, "its timers wait for the GPU at every phase")
        self.reasons["scheduler"] = (
            "none: Trainer's lr_scheduler_type makes it, and a section here would replace it"
        )


def _leave_to_transformers(writer: _Writer, arch: Architecture) -> None:
    """ "auto" where TrainingArguments or the hidden size give the value that is there."""
    zero = writer.sizes.zero.sizes(arch.hidden_size)
    auto = DeepSpeed().sizes(arch.hidden_size)
    same = {
        f"{ZERO}.reduce_bucket_size": "reduce_bucket",
        f"{ZERO}.stage3_prefetch_bucket_size": "prefetch_bucket",
        f"{ZERO}.stage3_param_persistence_threshold": "persistence_threshold",
    }
    keys = [*_FROM_ARGUMENTS, *(key for key, size in same.items() if zero[size] == auto[size])]
    for key in keys:
        if _has(writer.values, key):
            writer.put(key, AUTO, "")


def _has(values: Mapping[str, Any], key: str) -> bool:
    *sections, last = key.split(".")
    for name in sections:
        values = values.get(name, {})
    return last in values


_FROM_ARGUMENTS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16.enabled", "fp16.enabled", "optimizer.params.lr"),
    *("optimizer.params.betas", "optimizer.params.eps", "optimizer.params.weight_decay"),
)
_STAGES = (
    "nothing is partitioned",
    "optimizer states and masters are partitioned over the ranks",
    "optimizer states, masters and gradients are partitioned over the ranks",
    "weights as well are partitioned over the ranks, and gathered layer by layer",
)
_OFFLOADED = {
    "offload_optimizer": "masters, states and the gradients' partition leave the GPU",
    "offload_param": "the weights' partitions leave the GPU",
}
_PINNED = (
    "page-locked: copies run beside computation, at the bus's full rate; torch rounds each buffer "
    "up to a power of two"
)
_PAGEABLE = "pageable, as the recipe says: copies wait, and nothing is rounded up"
_REASONS = {
    "overlap_comm": "gradients are reduced while backward runs on",
    "contiguous_gradients": "gradients are copied to one buffer as they come: no fragments",
    "reduce_scatter": "a gradient goes to the rank that owns it, not to all",
    "round_robin_gradients": "false: it pays with offload, accumulation and many ranks only",
    "parameter_alignment": "false: padding costs memory",
    "allgather_bucket_size": "DeepSpeed's default; NCCL gathers all at once, and needs none",
    "memory_efficient_linear": "backward keeps partitions, not whole weights",
    "stage3_model_persistence_threshold": "DeepSpeed's default: no limit but that on each weight",
    "stage3_max_live_parameters": "DeepSpeed's default: so many elements may be whole at a time",
    "stage3_max_reuse_distance": "DeepSpeed's default: a weight used again within it stays whole",
    "sub_group_size": "DeepSpeed's default: the step takes so many elements at a time",
}
_NVME = {
    "optimizer_buffer_count": "a buffer for each of Adam's tensors: master, gradient, two states",
    "pipeline_read": "true reads ahead, with as many buffers again",
    "pipeline_write": "true writes behind, with as many buffers again",
    "fast_init": "DeepSpeed's default",
    "param_buffer_count": "DeepSpeed's default",
    "param_buffer_size": "DeepSpeed's default: the largest weight's piece has to go in",
    "max_in_cpu": "DeepSpeed's default: so many elements stay in host memory",
}
_AIO = {
    "block_size": 1048576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
    "use_gds": False,
}
