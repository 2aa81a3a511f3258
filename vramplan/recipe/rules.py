"""What can't go together, and why: combinations that the libraries refuse when the run is made.

Each rule is one function that returns the reason, or None. A reason names the fields, what refuses
them (library, function, version), and what to use instead. What depends on the model (targets that
match nothing) or on the card (bf16, FlashAttention-2) is judged where those are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vramplan.errors import IllegalRecipe
from vramplan.recipe.optimizers import LIBRARIES, OPTIMIZERS

if TYPE_CHECKING:
    from vramplan.recipe.recipe import Recipe


def trainable_dtype(recipe: Recipe) -> str:
    """The dtype of the parameters that are trained, and so of their gradients."""
    if recipe.deepspeed is not None and recipe.mixed_precision != "no":
        return "fp32"  # DeepSpeed steps and scales fp32 masters, whatever was loaded
    return recipe.dtype if recipe.lora is None else recipe.lora.dtype


def check(recipe: Recipe) -> None:
    """Raises IllegalRecipe with the reason if the libraries would refuse `recipe`."""
    for rule in _RULES:
        reason = rule(recipe)
        if reason is not None:
            raise IllegalRecipe(reason)


def cautions(recipe: Recipe) -> tuple[str, ...]:
    """What the libraries accept in `recipe`, and a person may not want."""
    found = []
    if trainable_dtype(recipe) == "fp16" and recipe.mixed_precision != "fp16":
        found.append(
            "trained in fp16 without loss scaling: it runs, but gradients underflow and AdamW's "
            "epsilon is 0 in fp16; bf16 costs the same memory"
        )
    return tuple(found)


def _quantized_full_fine_tuning(recipe: Recipe) -> str | None:
    # transformers 5.17, trainer_utils.py, validate_quantization_for_training.
    if recipe.quantization is None or recipe.lora is not None:
        return None
    return (
        f"quantization {recipe.quantization!r} with full fine-tuning: transformers' Trainer "
        'refuses ("You cannot perform fine-tuning on purely quantized models"). Add LoRA adapters, '
        "or leave quantization out"
    )


def _scaled_half_gradients(recipe: Recipe) -> str | None:
    # torch 2.13, amp/grad_scaler.py, GradScaler._unscale_grads_ for fp16. For bf16 the CUDA kernel
    # (ATen/native/cuda/AmpKernels.cu) has no such type: pytorch issue 127176.
    dtype = trainable_dtype(recipe)
    if recipe.mixed_precision != "fp16" or dtype == "fp32":
        return None
    said = (
        "Attempting to unscale FP16 gradients."
        if dtype == "fp16"
        else "\"_amp_foreach_non_finite_check_and_unscale_cuda\" not implemented for 'BFloat16'"
    )
    what = "dtype" if recipe.lora is None else "lora.dtype"
    return (
        f"{what} {dtype!r} with mixed_precision 'fp16': torch's gradient scaler refuses gradients "
        f"of trained {dtype} parameters ({said}). Use {what} 'fp32', or mixed_precision "
        f"{_without_scaler(dtype)}"
    )


def _without_scaler(dtype: str) -> str:
    return "'no'" if dtype == "fp16" else "'bf16' or 'no'"


def _flash_attention_in_fp32(recipe: Recipe) -> str | None:
    # transformers 5.17, integrations/flash_attention.py, get_target_dtype: under autocast q, k and
    # v are cast to its dtype, else to the weights'. flash-attn 2, csrc/flash_attn/flash_api.cpp:
    # "FlashAttention only support fp16 and bf16 data type".
    if recipe.attention != "flash_attention_2":
        return None
    if recipe.dtype != "fp32" or recipe.mixed_precision != "no":
        return None
    return (
        "attention 'flash_attention_2' with dtype 'fp32' and mixed_precision 'no': flash-attn has "
        "kernels for fp16 and bf16 only. Use mixed_precision 'bf16' or 'fp16', a 16-bit dtype, or "
        "attention 'sdpa'"
    )


def _bf16_gradients_without_kernel(recipe: Recipe) -> str | None:
    # bitsandbytes 0.50, backends/cuda/ops.py, _optimizer_update_32bit_impl: "Gradient+optimizer bit
    # data type combination not supported". The 8-bit variant meets it as well in full fine-tuning:
    # Trainer keeps embeddings, and bitsandbytes keeps small tensors (norms), in 32 bits.
    optimizer = OPTIMIZERS[recipe.optimizer]
    if not optimizer.refuses_bf16_gradients or trainable_dtype(recipe) != "bf16":
        return None
    if optimizer.bits == 8 and recipe.lora is not None:
        return None
    what = "dtype" if recipe.lora is None else "lora.dtype"
    return (
        f"optimizer {recipe.optimizer!r} with {what} 'bf16': bitsandbytes has no kernel that steps "
        "32-bit RMSprop states with bf16 gradients (the 8-bit variant has such states too, of "
        f"embeddings and tensors under 4096 elements). Use {what} 'fp32', or optimizer 'rmsprop'"
    )


def _sixteen_bits_without_engine(recipe: Recipe) -> str | None:
    # DeepSpeed 0.19.8, runtime/engine.py, get_data_types: without bf16 or fp16 it takes the model
    # for fp32, and accumulates gradients of 16-bit weights in fp32: not described here.
    if recipe.deepspeed is None or recipe.mixed_precision != "no" or recipe.dtype == "fp32":
        return None
    return (
        f"deepspeed with dtype {recipe.dtype!r} and mixed_precision 'no': DeepSpeed's engine is "
        "then fp32 over 16-bit weights. Use mixed_precision 'bf16' or 'fp16', or dtype 'fp32'"
    )


def _optimizer_elsewhere(recipe: Recipe) -> str | None:
    # DeepSpeed 0.19.8, runtime/engine.py, _do_optimizer_sanity_check: "untested ZeRO optimizer";
    # its partitions are flat, where GaLore and APOLLO project matrices.
    optimizer = OPTIMIZERS[recipe.optimizer]
    if recipe.deepspeed is None or optimizer.package in LIBRARIES:
        return None
    return (
        f"optimizer {recipe.optimizer!r} with deepspeed: ZeRO has not been tested with "
        f"{optimizer.package}. Use an optimizer of torch or bitsandbytes, or no deepspeed"
    )


def _stepping_in_backward(recipe: Recipe) -> str | None:
    # transformers 5.17, trainer_optimizer.py, _setup_low_rank_optimizer (layerwise); lomo-optim
    # 0.1.1, lomo.py: hooks step with a rank's own gradients, before they are averaged; accelerate
    # 1.15, accelerator.py, backward: under a gradient scaler lomo_backward is never reached, and
    # Tensor.backward gets its learning_rate.
    optimizer = OPTIMIZERS[recipe.optimizer]
    if optimizer.stepping != "in_backward":
        return None
    name = f"optimizer {recipe.optimizer!r}"
    layerwise = optimizer.low_rank is not None
    if layerwise and recipe.gradient_accumulation_steps > 1:
        plain = recipe.optimizer.removesuffix("_layerwise")
        return (
            f"{name} with gradient_accumulation_steps {recipe.gradient_accumulation_steps}: it "
            'steps in every backward, and transformers refuses ("does not support gradient '
            f'accumulation"). Use 1, or optimizer {plain!r}'
        )
    if recipe.world_size > 1:
        said = "transformers refuses that" if layerwise else "each with its own gradients"
        return f"{name} with world_size {recipe.world_size}: it steps in backward, {said}. Use 1"
    if not layerwise and recipe.mixed_precision == "fp16":
        return (
            f"{name} with mixed_precision 'fp16': accelerate scales the loss and then calls "
            "backward with LOMO's learning rate, which torch refuses (TypeError). Use "
            "mixed_precision 'bf16' or 'no'"
        )
    return None


_RULES: tuple[Callable[[Recipe], str | None], ...] = (
    _quantized_full_fine_tuning,
    _scaled_half_gradients,
    _flash_attention_in_fp32,
    _bf16_gradients_without_kernel,
    _sixteen_bits_without_engine,
    _optimizer_elsewhere,
    _stepping_in_backward,
)
