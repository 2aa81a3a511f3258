"""DeepSpeed: the ZeRO settings of a run, in ds_config's own words. Frozen, checked when made.

Names, defaults and ranges: DeepSpeed 0.19.8, runtime/zero/config.py (DeepSpeedZeroConfig) and
runtime/zero/offload_config.py. What "auto" means is filled in as transformers 5.17 does,
integrations/deepspeed.py (HfTrainerDeepSpeedConfig.trainer_config_finalize).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName

AUTO: Literal["auto"] = "auto"
Count = int | Literal["auto"]
Device = Literal["cpu", "nvme"]
DEVICES = ("cpu", "nvme")
STAGES = (0, 1, 2, 3)
_COUNTS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
    "optimizer_buffer_count",
    "param_buffer_count",
    "param_buffer_size",
    "max_in_cpu",
)
_AUTO_COUNTS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
_FLAGS = (
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "round_robin_gradients",
    "parameter_alignment",
    "memory_efficient_linear",
    "pin_memory",
    "pipeline_read",
    "pipeline_write",
    "fast_init",
)
SWAPPED_TENSORS = 4
"""Of a sub-group on NVMe: master, gradient and AdamW's states."""
SYS_MAXSIZE = 2**63 - 1
"""stage3_model_persistence_threshold's default: sys.maxsize."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeed:
    """ZeRO's stage and its settings. Sizes are numbers of elements, as in ds_config.

    Raises UnknownName, InvalidValue or IllegalRecipe when made of what DeepSpeed refuses.
    """

    stage: int = 2
    """0: nothing is partitioned; 1: optimizer states and masters; 2: gradients as well; 3: weights
    as well."""
    offload_optimizer: Device | None = None
    """Where the masters, the optimizer's states and the gradients' partition live: None is the
    GPU."""
    offload_param: Device | None = None
    """Where stage 3's weight partitions live: None is the GPU."""
    pin_memory: bool = True
    """Page-locked host memory for what is offloaded."""
    pin_param_memory: bool | None = None
    """offload_param's own pin_memory; None is as `pin_memory`."""
    nvme_path: str | None = None
    """A folder on NVMe, for what is offloaded there (nvme_path of either)."""
    optimizer_buffer_count: int = 4
    """offload_optimizer.buffer_count: buffers of a sub-group's states, for NVMe."""
    pipeline_read: bool = False
    """offload_optimizer.pipeline_read: read the next sub-group while one steps, for NVMe."""
    pipeline_write: bool = False
    """offload_optimizer.pipeline_write: write the last sub-group while one steps, for NVMe."""
    fast_init: bool = False
    """offload_optimizer.fast_init: write the first states straight to NVMe."""
    param_buffer_count: int = 5
    """offload_param.buffer_count: buffers of weights, for NVMe."""
    param_buffer_size: int = int(1e8)
    """offload_param.buffer_size: elements of each of those buffers."""
    max_in_cpu: int = int(1e9)
    """offload_param.max_in_cpu: elements of weights that stay on the host, for NVMe."""
    reduce_bucket_size: Count = AUTO
    """Gradients reduced at once; "auto" is hidden size squared."""
    allgather_bucket_size: int = int(5e8)
    """Weights gathered at once after the step, where the backend cannot gather all at once."""
    overlap_comm: bool = True
    """Reduce while backward runs: a second bucket in stages 1 and 2."""
    contiguous_gradients: bool = True
    """Gradients are copied to a bucket as they come."""
    reduce_scatter: bool = True
    """Reduce each gradient to its owner only."""
    round_robin_gradients: bool = False
    """Deal parameters out to ranks in turn: the same sizes, other owners."""
    parameter_alignment: bool = False
    """Stages 1 and 2: each parameter starts at a multiple of 16 bytes of the flat buffer."""
    memory_efficient_linear: bool = True
    """Stage 3 replaces torch's linear, whose backward then keeps the partitioned weight alone."""
    stage3_prefetch_bucket_size: Count = AUTO
    """Weights gathered ahead; "auto" is 0.9 x hidden size squared."""
    stage3_param_persistence_threshold: Count = AUTO
    """Weights of at most so many elements are never partitioned; "auto" is 10 x hidden size."""
    stage3_model_persistence_threshold: int = SYS_MAXSIZE
    """At most so many elements of all weights together stay unpartitioned."""
    stage3_max_live_parameters: int = int(1e9)
    """Weights that may be gathered at a time: beyond it nothing is gathered ahead."""
    stage3_max_reuse_distance: int = int(1e9)
    """A weight that is used again within so many elements stays gathered."""
    sub_group_size: int = int(1e9)
    """Stage 3 steps so many elements of its partition at a time."""

    def __post_init__(self) -> None:
        if type(self.stage) is not int or self.stage not in STAGES:
            raise InvalidValue("deepspeed.stage", self.stage, "0, 1, 2 or 3")
        for name in ("offload_optimizer", "offload_param"):
            value = getattr(self, name)
            if value is not None and value not in DEVICES:
                raise UnknownName(f"deepspeed.{name}", value, DEVICES)
        for name in _COUNTS:
            _check_count(name, getattr(self, name))
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise InvalidValue(f"deepspeed.{name}", getattr(self, name), "True or False")
        if self.pin_param_memory is not None and type(self.pin_param_memory) is not bool:
            raise InvalidValue(
                "deepspeed.pin_param_memory", self.pin_param_memory, "True, False or None"
            )
        if self.nvme_path is not None and not (isinstance(self.nvme_path, str) and self.nvme_path):
            raise InvalidValue("deepspeed.nvme_path", self.nvme_path, "a folder's path")
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload_optimizer is not None and self.stage == 0:
            raise IllegalRecipe(
                "deepspeed.offload_optimizer with stage 0: DeepSpeed offloads from stage 1 on "
                "(offload_optimizer is read by its ZeRO optimizers alone). Use stage 1, 2 or 3"
            )
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise IllegalRecipe(
                f"deepspeed.offload_optimizer 'nvme' with stage {self.stage}: only stage 3 swaps "
                "states to NVMe (runtime/zero/offload_config.py). Use stage 3, or 'cpu'"
            )
        if self.offload_param is not None and self.stage != 3:
            raise IllegalRecipe(
                f"deepspeed.offload_param with stage {self.stage}: weights are partitioned, and so "
                "offloaded, in stage 3 alone (runtime/zero/config.py). Use stage 3, or leave it out"
            )
        self._check_nvme()

    def _check_nvme(self) -> None:
        """What runtime/swap_tensor/ would stumble over while the engine is made."""
        swapped = [n for n in ("offload_optimizer", "offload_param") if getattr(self, n) == "nvme"]
        if swapped and self.nvme_path is None:
            raise IllegalRecipe(
                f"deepspeed.{swapped[0]} 'nvme' without a path: DeepSpeed has no default for "
                "nvme_path (stage3.py, _configure_tensor_swapping joins it to a folder's name). "
                "Set nvme_path (--nvme-path) to a folder on the drive"
            )
        if "offload_optimizer" in swapped and self.optimizer_buffer_count < SWAPPED_TENSORS:
            raise IllegalRecipe(
                f"deepspeed.optimizer_buffer_count {self.optimizer_buffer_count} with states on "
                f"NVMe: a sub-group is swapped in as {SWAPPED_TENSORS} tensors (master, gradient, "
                "AdamW's two states), each in a buffer of its own (partitioned_optimizer_swapper"
                f".py, swap_in_optimizer_state). Use at least {SWAPPED_TENSORS}"
            )

    def sizes(self, hidden: int) -> dict[str, int]:
        """`reduce_bucket`, `prefetch_bucket`, `persistence_threshold` for a hidden size."""

        def filled(value: Count, auto: int) -> int:
            return auto if value == AUTO else int(value)

        return {
            "reduce_bucket": filled(self.reduce_bucket_size, hidden * hidden),
            "prefetch_bucket": filled(self.stage3_prefetch_bucket_size, int(0.9 * hidden * hidden)),
            "persistence_threshold": filled(self.stage3_param_persistence_threshold, 10 * hidden),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepSpeed:
        """The reverse of `to_dict`; keys left out take their defaults. Raises UserError."""
        if not isinstance(values, Mapping):
            raise InvalidValue("deepspeed", values, "None, or DeepSpeed(stage=…, …)")
        names = tuple(field.name for field in fields(cls))
        for key in values:
            if key not in names:
                raise UnknownName("deepspeed field", key, names)
        return cls(**values)


def _check_count(name: str, value: object) -> None:
    if value == AUTO and name in _AUTO_COUNTS:
        return
    if type(value) is bool or not isinstance(value, int) or value < 0:
        allowed = "a number of elements" + (', or "auto"' if name in _AUTO_COUNTS else "")
        raise InvalidValue(f"deepspeed.{name}", value, allowed)
