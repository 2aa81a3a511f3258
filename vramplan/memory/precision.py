"""The policy under which a description runs: dtypes, autocast, quantization, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vramplan.models.architecture import Architecture
from vramplan.recipe.optimizers import OPTIMIZERS, Optimizer
from vramplan.recipe.recipe import Recipe


class Projection(NamedTuple):
    """GaLore's and APOLLO's: whose gradients are projected, to which rank, and how."""

    targets: tuple[str, ...] | str
    rank: int
    kind: str

    def names(self, module: str) -> bool:
        """transformers 5.17, trainer_utils.py, check_target_module_exists: a part will do."""
        return self.targets == "all-linear" or any(target in module for target in self.targets)


@dataclass(frozen=True, slots=True)
class Policy:
    """What of a recipe shapes the tape; batch, sequence and most optimizers do not."""

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
    in_backward: str | None = None  # the optimizer, if it steps as soon as there is a gradient
    projection: Projection | None = None  # of gradients, before they are stepped with
    copies_outputs: bool = False  # DDP looks for unused parameters: loss and logits are cloned

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
    zero.Init makes no quantized model (transformers 5.17, modeling_utils.py, get_init_context).
    """
    if recipe.lora is None:
        return "fp32"
    cast = recipe.quantization is not None or (
        recipe.deepspeed is not None and recipe.deepspeed.stage < 3
    )
    return engine if engine and cast else recipe.lora.dtype


def keeps_gradients(recipe: Recipe) -> bool:
    """Whether gradients stay on the weights between micro-batches.

    ZeRO takes them away, and so does an optimizer that steps in backward.
    """
    if OPTIMIZERS[recipe.optimizer].stepping == "in_backward":
        return False
    return recipe.deepspeed is None or recipe.deepspeed.stage == 0


def _projection(recipe: Recipe, optimizer: Optimizer) -> Projection | None:
    if optimizer.low_rank is None:
        return None
    return Projection(recipe.optim_target_modules, recipe.optim_rank, optimizer.low_rank)


def looks_for_unused(recipe: Recipe) -> bool:
    """Whether DDP is told to find unused parameters.

    transformers 5.17, trainer.py, create_accelerator_and_postprocess: a model of its own that is
    checkpointed is not searched; peft's is none of its own. torch 2.13, nn/parallel/distributed.py,
    _post_forward: the outputs then go through _DDPSink, which clones them.
    """
    if recipe.deepspeed is not None or recipe.world_size == 1:
        return False
    return recipe.lora is not None or not recipe.gradient_checkpointing


# check_prefer_cudnn_attention, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
CUDNN_PREFERRED = (None, "9.0", "10.0")


def policy_of(recipe: Recipe, arch: Architecture, capability: str | None = None) -> Policy:
    """The policy that a recipe means for a model on a card of that compute capability.

    None, an unknown card, is taken for a Hopper.
    """
    lora, optimizer = recipe.lora, OPTIMIZERS[recipe.optimizer]
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
        in_backward=recipe.optimizer if optimizer.stepping == "in_backward" else None,
        projection=_projection(recipe, optimizer),
        copies_outputs=looks_for_unused(recipe),
        beyond_window=arch.sliding_window is not None and recipe.seq_len >= arch.sliding_window,
    )
