"""Reading a user's ds_config.json: what of it an estimate honours, and what it has to say of it.

Defaults of keys that are left out are DeepSpeed 0.19.8's own (runtime/zero/config.py); "auto" stays
what transformers 5.17 makes of it (integrations/deepspeed.py): TrainingArguments' value, or one by
the hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName, UserError, nearest
from vramplan.recipe import ds_keys
from vramplan.recipe.deepspeed import AUTO, DeepSpeed
from vramplan.recipe.ds_json import loads

_STAGED = {
    (1, 2, 3): (
        *("reduce_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter"),
        "offload_optimizer",
    ),
    (1, 2): ("allgather_bucket_size", "round_robin_gradients", "parameter_alignment"),
    (3,): (
        *("memory_efficient_linear", "sub_group_size", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "offload_param"),
    ),
}
_OPTIMIZER_TO_NVME = ("optimizer_buffer_count", "pipeline_read", "pipeline_write", "fast_init")
_PARAM_TO_NVME = ("param_buffer_count", "param_buffer_size", "max_in_cpu")
# DeepSpeed's own, where the dataclass has transformers' "auto".
_LEFT_OUT = {
    "reduce_bucket_size": int(5e8),
    "stage3_prefetch_bucket_size": int(5e7),
    "stage3_param_persistence_threshold": int(1e5),
}
# optimizer.type, as runtime/engine.py reads it, and the `optim` that keeps the same states.
_OPTIMIZERS = {
    "adam": "adamw_torch_fused",
    "adamw": "adamw_torch_fused",
    "adagrad": "adagrad",
    "lion": "lion_32bit",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
}
_NEAR_OPTIMIZERS = {
    "lamb": "adamw_torch_fused",
    "muadam": "adamw_torch_fused",
    "muadamw": "adamw_torch_fused",
    "muon": "adamw_torch_fused",
    "musgd": "sgd",
}
_HYPER = {
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "gradient_clipping": "max_grad_norm",
}
_MAY_BE_NULL = ("overlap_comm", "nvme_path")  # Optional in DeepSpeed's models


def counts_in(zero: DeepSpeed) -> tuple[str, ...]:
    """The fields that DeepSpeed looks at with this stage and this offload."""
    found = ["stage"]
    for stages, names in _STAGED.items():
        found += names if zero.stage in stages else ()
    if zero.offload_optimizer or zero.offload_param:
        found += ["pin_memory", "pin_param_memory"]
    if "nvme" in (zero.offload_optimizer, zero.offload_param):
        found.append("nvme_path")
    found += _OPTIMIZER_TO_NVME if zero.offload_optimizer == "nvme" else ()
    found += _PARAM_TO_NVME if zero.offload_param == "nvme" else ()
    return tuple(found)


def only_what_counts(zero: DeepSpeed) -> DeepSpeed:
    """The same run, all that DeepSpeed does not look at being at its default."""
    counts = counts_in(zero)
    default = DeepSpeed()
    idle = {f.name: getattr(default, f.name) for f in fields(DeepSpeed) if f.name not in counts}
    out = replace(zero, **idle)
    params = out.pin_memory if out.pin_param_memory is None else out.pin_param_memory
    if out.offload_optimizer is None:
        return replace(out, pin_memory=params, pin_param_memory=None)
    if out.offload_param is None or params == out.pin_memory:
        return replace(out, pin_param_memory=None)
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class DsConfig:
    """What a ds_config.json says."""

    name: str
    deepspeed: DeepSpeed
    precision: str | None
    """mixed_precision; None where it is left to TrainingArguments."""
    optimizer: str | None
    """`optim` of the same states; None without an optimizer section."""
    train_batch_size: int | None
    batch_size: int | None
    accumulation: int | None
    """The three numbers of the batch; None: left out, or "auto"."""
    hyper: dict[str, Any] = field(default_factory=dict)
    """learning_rate, weight_decay, adam_beta1, … and max_grad_norm, where they are given."""
    warnings: tuple[str, ...] = ()
    keys: dict[str, ds_keys.Kind] = field(default_factory=dict)
    """Every key, dotted, and what it means to an estimate."""


def read_ds_config(
    source: str | os.PathLike[str] | Mapping[str, Any], *, stage: int | str | None = None
) -> DsConfig:
    """The settings in a file or a dict; `stage` overrides the one there.

    Raises UserError, which names the file and the key: for a malformed file, for what DeepSpeed
    refuses, and for what it ignores in that stage (offload).
    """
    if isinstance(source, Mapping):
        return _Reader("ds_config", dict(source), stage).read()
    name = f"DeepSpeed config {os.fspath(source)!r}"
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {name}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{name} is malformed: {error}") from error
    values, tolerated = loads(text, name)
    reader = _Reader(os.path.basename(os.fspath(source)), values, stage)
    if tolerated:
        reader.warn(
            "it has comments or trailing commas: DeepSpeed reads it (hjson), transformers and "
            "accelerate refuse it (json)"
        )
    return reader.read()


class _Reader:
    """One file, read once."""

    def __init__(self, name: str, values: dict[str, Any], stage: int | str | None) -> None:
        self.name, self.values, self.stage = name, values, stage
        self.warnings: list[str] = []
        self.keys: dict[str, ds_keys.Kind] = {}
        self.flat: dict[str, Any] = {}

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self.name}: {text}")

    def read(self) -> DsConfig:
        self._look_at(self.values, "")
        deepspeed = self._deepspeed()
        return DsConfig(
            name=self.name,
            deepspeed=deepspeed,
            precision=self._precision(),
            optimizer=self._optimizer(),
            train_batch_size=self._count("train_batch_size"),
            batch_size=self._count("train_micro_batch_size_per_gpu"),
            accumulation=self._count("gradient_accumulation_steps"),
            hyper=self._hyper(),
            warnings=tuple(self.warnings),
            keys=self.keys,
        )

    # -- keys -----------------------------------------------------------------------------------
    def _look_at(self, values: Mapping[str, Any], path: str) -> None:
        for key, value in values.items():
            name = f"{path}{key}"
            if name in ds_keys.REMOVED:
                raise UserError(
                    f"{self.name}: {name}: DeepSpeed 0.19 has removed this, and refuses a file "
                    "that has it (runtime/config.py, _reject_removed_config_keys). Take it out"
                )
            if isinstance(value, Mapping) and self._opens(name):
                self._look_at(value, f"{name}.")
                continue
            self.flat[ds_keys.ALIASES.get(name, name)] = value
            if isinstance(value, bool) and name == "zero_optimization":
                self.flat["zero_optimization.stage"] = int(value)  # read_zero_config_deprecated
            elif value is not None and (name in ds_keys.OPEN or name in ds_keys.SECTIONS):
                raise InvalidValue(f"{self.name}: {name}", value, "a table of settings")
            self._judge(name, value)

    def _opens(self, name: str) -> bool:
        return name in ds_keys.OPEN or name in ds_keys.SECTIONS or name == "optimizer.params"

    def _judge(self, name: str, value: Any) -> None:
        kind = ds_keys.kind_of(name, value)
        if name in ds_keys.SECTIONS or name in ds_keys.OPEN:
            kind = "honoured"  # null, or zero_optimization: true
        self.keys[name] = kind
        if kind == "unknown":
            section = name.partition(".")[0]
            does = "refuses" if "." in name and section in ds_keys.STRICT else "ignores"
            near = nearest(name, ds_keys.KNOWN)
            self.warn(
                f"unknown key {name!r}, which DeepSpeed {does}"
                + (f"; nearest: {near!r}" if near else "")
            )
        elif kind == "not modelled":
            self.warn(f"{name}{_shown(value)} changes memory, and is not modelled")
        elif kind == "no effect":
            self.warn(f"{name} has no effect: {ds_keys.NO_EFFECT[name]}")

    # -- values ---------------------------------------------------------------------------------
    def _get(self, key: str) -> Any:
        return self.flat.get(key)

    def _count(self, key: str) -> int | None:
        """A number of at least 1; None for "auto" or nothing."""
        value = self._get(key)
        if value is None or value == AUTO:
            return None
        number = _whole(value)
        if number is None or number < 1:
            raise InvalidValue(f"{self.name}: {key}", value, 'an integer of at least 1, or "auto"')
        return number

    def _flag(self, key: str) -> bool | None:
        value = self._get(key)
        if key not in self.flat or value == AUTO:
            return None
        if type(value) is not bool:
            raise InvalidValue(f"{self.name}: {key}", value, 'true, false or "auto"')
        return value

    def _precision(self) -> str | None:
        old, new = self._flag("bfloat16.enabled"), self._flag("bf16.enabled")
        bf16 = old if new is None else new
        fp16 = self._flag("fp16.enabled")
        if bf16 and fp16:
            raise IllegalRecipe(
                f"{self.name}: bf16.enabled and fp16.enabled are both true: DeepSpeed refuses "
                "('bfloat16 and fp16 modes cannot be simultaneously enabled'). Set one to false"
            )
        if bf16 or fp16:
            return "bf16" if bf16 else "fp16"
        return "no" if bf16 is False and fp16 is not None else None

    def _optimizer(self) -> str | None:
        name = self._get("optimizer.type")
        if name is None:
            return None
        known = {**_OPTIMIZERS, **_NEAR_OPTIMIZERS}
        if not isinstance(name, str) or name.lower() not in known:
            raise UnknownName(f"optimizer.type in {self.name}", name, known)
        if name.lower() in _NEAR_OPTIMIZERS:
            near = _NEAR_OPTIMIZERS[name.lower()]
            self.warn(f"optimizer {name} is not modelled: estimated as {near}")
        elif self._get("optimizer.params.torch_adam") is True:
            self.warn("torch_adam is not modelled: estimated as DeepSpeed's own Adam")
        return known[name.lower()]

    def _hyper(self) -> dict[str, Any]:
        found = {}
        for key, name in _HYPER.items():
            value = self._get(key)
            if value is None or value == AUTO:
                continue
            found[name] = self._number(key, value)
        betas = self._get("optimizer.params.betas")
        if betas is not None and betas != AUTO:
            if not isinstance(betas, (list, tuple)) or len(betas) != 2:
                key = "optimizer.params.betas"
                raise InvalidValue(f"{self.name}: {key}", betas, 'two numbers, or "auto"')
            found["adam_beta1"], found["adam_beta2"] = (
                self._number("optimizer.params.betas", beta) for beta in betas
            )
        return found

    def _number(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < float("inf"):
            raise InvalidValue(f"{self.name}: {key}", value, 'a number from 0, or "auto"')
        return float(value)

    def _deepspeed(self) -> DeepSpeed:
        if "zero_optimization" not in self.values:
            self.warn("no zero_optimization: stage 0 to DeepSpeed, and accelerate refuses it")
        if self.stage is not None:
            self.flat["zero_optimization.stage"] = self.stage
        self._replace_deprecated()
        if self._get("zero_optimization.legacy_stage1") is True:
            raise IllegalRecipe(
                f"{self.name}: legacy_stage1: DeepSpeed has taken it out, and refuses it "
                "(runtime/engine.py, _configure_zero_optimizer). Leave it out"
            )
        stage = self._get("zero_optimization.stage")
        given = {name: self._field(name, key) for name, key in ds_keys.FIELDS.items()}
        values = {name: value for name, value in given.items() if value is not None}
        values["stage"] = 0 if stage is None else _or_itself(stage)
        for name, value in _LEFT_OUT.items():
            values.setdefault(name, value)
        values.setdefault("overlap_comm", values["stage"] == 3)
        second = self._get("zero_optimization.offload_param.nvme_path")
        if second is not None:
            first = values.setdefault("nvme_path", second)
            if first != second:
                self.warn(f"two nvme_path: {first!r} is taken for both")
        try:
            zero = DeepSpeed(**values)
            if zero.reduce_bucket_size == 0:
                raise InvalidValue("reduce_bucket_size", 0, "at least 1")
            if zero.offload_optimizer is None:  # its other settings mean nothing
                zero = replace(zero, pin_memory=True)
            return only_what_counts(zero)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _field(self, name: str, key: str) -> Any:
        """A field's value as the dataclass takes it; it judges the range."""
        full = f"zero_optimization.{key}"
        value = self._get(full)
        if value is None and full in self.flat and name not in _MAY_BE_NULL:
            raise InvalidValue(f"{self.name}: {full}", None, "a value, or left out")
        if name in ("offload_optimizer", "offload_param"):
            return None if value == "none" else value
        if value == AUTO and name not in _LEFT_OUT:
            return None  # DeepSpeedConfigModel drops what is "auto"
        return _or_itself(value)

    def _replace_deprecated(self) -> None:
        for old, new in (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
        ):
            if self._get(f"zero_optimization.{old}") is None:  # Optional: null is no request
                continue
            if self._flag(f"zero_optimization.{old}"):
                self.flat.setdefault(f"zero_optimization.{new}.device", "cpu")
                self.warn(f"zero_optimization.{old} is deprecated: {new} replaces it")


def _whole(value: Any) -> int | None:
    """5e8 is an integer, as pydantic reads it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value // 1 else None


def _or_itself(value: Any) -> Any:
    number = _whole(value)
    return value if number is None else number


def _shown(value: Any) -> str:
    return "" if isinstance(value, (Mapping, list)) else f" = {value!r}"
