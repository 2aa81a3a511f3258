"""The policy under which a description runs: dtypes, autocast, quantization, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vramplan.models.architecture import Architecture
from vramplan.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a recipe shapes the tape; batch, sequence and optimizer do not."""

    dtype: str = "bf16"
    autocast: str | None = "bf16"
    quantization: str | None = None
    double_quant: bool = True
    compute_dtype: str = "bf16"
    rank: int | None = None
    lora_dropout: float = 0.0
    adapter_dtype: str = "fp32"
    targets: tuple[str, ...] | str | None = None
    attention: str = "sdpa"
    checkpointing: bool = False
    single_sequence: bool = False  # batch 1: merging batch and heads needs no copy
    accumulating: bool = False  # gradients of an earlier micro-batch are there already
    cudnn: bool = True  # sdpa prefers cuDNN: Hopper and data centre Blackwell
    beyond_window: bool = False  # sequence longer than the sliding window
    engine: str | None = None  # DeepSpeed's dtype, to which it casts all but what is quantized

    @property
    def weight_dtype(self) -> str:
        """prepare_model_for_kbit_training upcasts all that is not quantized to fp32 (peft)."""
        if self.engine is not None:
            return self.engine
        return "fp32" if self.quantization else self.dtype

    @property
    def trains_base(self) -> bool:
        return self.rank is None

    def adapts(self, name: str) -> bool:
        """peft's rule: the name is a target or ends with .target; all-linear takes every linear."""
        if self.rank is None or self.targets is None:
            return False
        if self.targets == "all-linear":
            return True
        return any(name == t or name.endswith("." + t) for t in self.targets)

    def adapts_parameter(self, former: Sequence[str]) -> bool:
        """Whether targets name (all of) the former modules that a parameter merges.

        peft 0.21 reads targets of transformers 4's module names so; all-linear names everything.
        """
        if self.rank is None or not former or self.targets is None:
            return False
        if self.targets == "all-linear":
            return True
        return all(any(t == n or t.endswith("." + n) for t in self.targets) for n in former)


def _adapter_dtype(recipe: Recipe, engine: str | None) -> str:
    """DeepSpeed 0.19.8, engine.py, _cast_module_mixed_precision: weights are cast to the engine's
    dtype, but under stage 3 none are (zero.Init made them so), and adapters came after that.
    """
    if recipe.lora is None:
        return "fp32"
    whole = recipe.deepspeed is not None and recipe.deepspeed.stage < 3
    return engine if engine and whole else recipe.lora.dtype


def keeps_gradients(recipe: Recipe) -> bool:
    """Whether gradients stay on the weights between micro-batches; ZeRO takes them away."""
    return recipe.deepspeed is None or recipe.deepspeed.stage == 0


# check_prefer_cudnn_attention, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
CUDNN_PREFERRED = (None, "9.0", "10.0")


def policy_of(recipe: Recipe, arch: Architecture, capability: str | None = None) -> Policy:
    """The policy that a recipe means for a model on a card of that compute capability.

    None, an unknown card, is taken for a Hopper.
    """
    lora = recipe.lora
    autocast = None if recipe.mixed_precision == "no" else recipe.mixed_precision
    engine = None if recipe.deepspeed is None else autocast or "fp32"
    return Policy(
        dtype=engine or recipe.dtype,
        # accelerate 1.15, accelerator.py: prepare_model's autocast is not for DeepSpeed's engine
        autocast=None if engine else autocast,
        engine=engine,
        quantization=recipe.quantization,
        double_quant=recipe.double_quant,
        compute_dtype=autocast or recipe.dtype,
        rank=lora.rank if lora else None,
        lora_dropout=float(lora.dropout) if lora else 0.0,
        adapter_dtype=_adapter_dtype(recipe, engine),
        targets=lora.target_modules if lora else None,
        attention=recipe.attention,
        checkpointing=recipe.gradient_checkpointing,
        single_sequence=recipe.batch_size == 1,
        accumulating=recipe.gradient_accumulation_steps > 1 and keeps_gradients(recipe),
        cudnn=capability in CUDNN_PREFERRED,
        beyond_window=arch.sliding_window is not None and recipe.seq_len >= arch.sliding_window,
    )
