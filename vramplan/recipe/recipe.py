"""Recipe: everything that a user chooses about a run. Frozen, hashable, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal

from vramplan.errors import InvalidValue, UnknownName
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.rules import check

Dtype = Literal["fp32", "bf16", "fp16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
Quantization = Literal["int8", "nf4", "fp4"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Allocator = Literal["expandable_segments", "default"]

DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")
MIXED_PRECISIONS: tuple[MixedPrecision, ...] = ("no", "bf16", "fp16")
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "nf4", "fp4")
ATTENTIONS: tuple[Attention, ...] = ("eager", "sdpa", "flash_attention_2")
ALLOCATORS: tuple[Allocator, ...] = ("expandable_segments", "default")

ALL_LINEAR = "all-linear"
"""peft's word for every linear layer but the output head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRA:
    """Adapters as peft's LoraConfig makes them; everything else is frozen."""

    rank: int = 16
    """LoraConfig's r: the inner size of each pair of adapter matrices."""
    alpha: float | None = None
    """LoraConfig's lora_alpha; None is twice the rank. A factor: it costs no memory."""
    dropout: float = 0.05
    """LoraConfig's lora_dropout, from 0 to less than 1. Above 0 a mask is kept for each target."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """"all-linear", or module names ("q_proj", "mlp.down_proj") matched by their ending, as peft
    does. Any iterable of names is taken; kept sorted, each name once."""
    dtype: Dtype = "fp32"
    """The adapters' own dtype. peft makes them fp32 (autocast_adapter_dtype=True)."""

    def __post_init__(self) -> None:
        _check_integer("lora.rank", self.rank)
        if self.alpha is not None and not (_is_number(self.alpha) and self.alpha > 0):
            raise InvalidValue("lora.alpha", self.alpha, "a number above 0, or None for 2 × rank")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise InvalidValue("lora.dropout", self.dropout, "a number from 0 to less than 1")
        _check_name("lora.dtype", self.dtype, DTYPES)
        object.__setattr__(
            self, "target_modules", _targets(self.target_modules, "lora.target_modules")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.target_modules, tuple):
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRA:
        """The reverse of `to_dict`; keys left out take their defaults. Raises UserError."""
        return cls(**_known(cls, "LoRA field", values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run of transformers' Trainer: the model's precision, what is trained, and the batch.

    Raises UnknownName, InvalidValue or IllegalRecipe when made of what can't be run.
    """

    dtype: Dtype = "bf16"
    """The dtype in which the weights are loaded (`from_pretrained(dtype=…)`)."""
    mixed_precision: MixedPrecision = "bf16"
    """Trainer's `bf16` or `fp16`: autocast, and for fp16 a gradient scaler; or "no"."""
    quantization: Quantization | None = None
    """bitsandbytes' LLM.int8, NF4 or FP4 for the linear weights; needs `lora`."""
    double_quant: bool = True
    """Quantize the 4-bit weights' absmax values too (bnb_4bit_use_double_quant); int8 has none."""
    lora: LoRA | None = None
    """Train adapters, not the model; None is full fine-tuning. True or a dict is taken too."""
    attention: Attention = "sdpa"
    """transformers' attn_implementation."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward (non-reentrant) instead of keeping its activations."""
    optimizer: str = "adamw_torch_fused"
    """transformers' `optim`; the names are in vramplan.recipe.optimizers."""
    optim_target_modules: str | tuple[str, ...] = ALL_LINEAR
    """transformers' name, of GaLore and APOLLO alone: whose gradients they project. Parts of module
    names, or "all-linear"."""
    optim_rank: int = 128
    """`rank` in transformers' `optim_args`, of GaLore and APOLLO alone."""
    batch_size: int = 1
    """Trainer's per_device_train_batch_size."""
    seq_len: int = 2048
    """Tokens a sequence; every sequence has this length."""
    gradient_accumulation_steps: int = 1
    """Micro-batches before each optimizer step."""
    deepspeed: DeepSpeed | None = None
    """ZeRO settings; None is torch alone. A dict is taken too."""
    world_size: int = 1
    """GPUs that train together, one process each; without `deepspeed`, by torch's DDP."""
    allocator: Allocator = "expandable_segments"
    """PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True, or torch's default."""

    def __post_init__(self) -> None:
        if self.lora is not None and not isinstance(self.lora, LoRA):
            object.__setattr__(self, "lora", _lora(self.lora))
        if self.deepspeed is not None and not isinstance(self.deepspeed, DeepSpeed):
            object.__setattr__(self, "deepspeed", DeepSpeed.from_dict(self.deepspeed))
        _check_name("dtype", self.dtype, DTYPES)
        _check_name("mixed_precision", self.mixed_precision, MIXED_PRECISIONS)
        if self.quantization is not None:
            _check_name("quantization", self.quantization, QUANTIZATIONS)
        _check_name("attention", self.attention, ATTENTIONS)
        _check_name("allocator", self.allocator, ALLOCATORS)
        _check_flag("double_quant", self.double_quant)
        _check_flag("gradient_checkpointing", self.gradient_checkpointing)
        _check_integer("batch_size", self.batch_size)
        _check_integer("seq_len", self.seq_len)
        _check_integer("gradient_accumulation_steps", self.gradient_accumulation_steps)
        _check_integer("world_size", self.world_size)
        if not isinstance(self.optimizer, str):
            raise InvalidValue("optimizer", self.optimizer, "a name, such as 'adamw_torch_fused'")
        find_optimizer(self.optimizer)
        targets = _targets(self.optim_target_modules, "optim_target_modules")
        object.__setattr__(self, "optim_target_modules", targets)
        _check_integer("optim_rank", self.optim_rank)
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, in the order of the fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["lora"] = self.lora.to_dict() if self.lora is not None else None
        values["deepspeed"] = self.deepspeed.to_dict() if self.deepspeed is not None else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The reverse of `to_dict`; keys left out take their defaults. Raises UserError."""
        return cls(**_known(cls, "recipe field", values))


# What people type who know these by another library's name.
_ELSEWHERE = {
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "sequence_length": "seq_len",
    "optim": "optimizer",
    "attn_implementation": "attention",
    "torch_dtype": "dtype",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "bnb_4bit_quant_type": "quantization",
    "bnb_4bit_use_double_quant": "double_quant",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
}
_SAME_AS = {
    "none": "no",
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "4bit": "nf4",
    "int4": "nf4",
    "8bit": "int8",
    "flash": "flash_attention_2",
    "flash_attn": "flash_attention_2",
}


def _known(cls: type[LoRA] | type[Recipe], thing: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidValue(cls.__name__, values, "a table of fields and their values")
    names = tuple(field.name for field in fields(cls))
    for key in values:
        if key not in names:
            meant = _ELSEWHERE.get(str(key))
            raise UnknownName(thing, key, names, closest=meant if meant in names else None)
    return dict(values)


def _lora(value: Any) -> LoRA | None:
    if value is True:
        return LoRA()
    if value is False:
        return None
    if isinstance(value, Mapping):
        return LoRA.from_dict(value)
    raise InvalidValue("lora", value, "None, or LoRA(rank=…, …)")


def _targets(value: object, thing: str) -> str | tuple[str, ...]:
    hint = 'Name modules, such as ("q_proj", "v_proj"), or say "all-linear".'
    if isinstance(value, str):
        if value.strip().lower().replace("_", "-") == ALL_LINEAR:
            return ALL_LINEAR
        value = (value,)
    if not isinstance(value, (tuple, list, set, frozenset)) or not value:
        raise InvalidValue(thing, value, "'all-linear' or module names", hint)
    for name in value:
        # peft takes a lone string for a regular expression; a name here is a name.
        if not isinstance(name, str) or not name.replace("_", "a").replace(".", "a").isalnum():
            raise InvalidValue(thing, name, "'all-linear' or module names", hint)
    return tuple(sorted(set(value)))


def _check_name(thing: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        meant = _SAME_AS.get(str(value).lower().removeprefix("torch."))
        raise UnknownName(thing, value, allowed, closest=meant if meant in allowed else None)


def _check_integer(thing: str, value: object) -> None:
    # bool is an int to Python, and True is no batch size.
    if type(value) is bool or not isinstance(value, int) or value < 1:
        raise InvalidValue(thing, value, "an integer of at least 1")


def _check_flag(thing: str, value: object) -> None:
    if type(value) is not bool:
        raise InvalidValue(thing, value, "True or False")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and isfinite(value)
