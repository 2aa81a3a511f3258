from __future__ import annotations

from typing import Any

import pytest

from vramplan.errors import IllegalRecipe
from vramplan.recipe import LoRA, Recipe
from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.recipe.recipe import DTYPES, MIXED_PRECISIONS, QUANTIZATIONS
from vramplan.recipe.rules import cautions, trainable_dtype


def refused(**values: Any) -> str:
    with pytest.raises(IllegalRecipe) as caught:
        Recipe(**values)
    return str(caught.value)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantized_weights_need_adapters(quantization: Any) -> None:
    reason = refused(quantization=quantization)
    assert f"quantization {quantization!r} with full fine-tuning" in reason
    assert "You cannot perform fine-tuning on purely quantized models" in reason
    assert "Add LoRA adapters" in reason
    assert Recipe(quantization=quantization, lora=LoRA()).quantization == quantization


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed_precision", MIXED_PRECISIONS)
def test_the_scaler_takes_fp32_gradients_only(dtype: Any, mixed_precision: Any) -> None:
    if mixed_precision == "fp16" and dtype != "fp32":
        assert "gradient scaler refuses" in refused(dtype=dtype, mixed_precision=mixed_precision)
    else:
        Recipe(dtype=dtype, mixed_precision=mixed_precision)
    # Frozen weights have no gradients: only the adapters' dtype counts.
    Recipe(dtype=dtype, mixed_precision=mixed_precision, lora=LoRA(dtype="fp32"))


def test_what_the_scaler_says() -> None:
    reason = refused(dtype="fp16", mixed_precision="fp16")
    assert reason.startswith("dtype 'fp16' with mixed_precision 'fp16'")
    assert "Attempting to unscale FP16 gradients." in reason
    reason = refused(dtype="fp32", mixed_precision="fp16", lora=LoRA(dtype="bf16"))
    assert reason.startswith("lora.dtype 'bf16' with mixed_precision 'fp16'")
    assert "not implemented for 'BFloat16'" in reason
    assert reason.endswith("Use lora.dtype 'fp32', or mixed_precision 'bf16' or 'no'")


def test_flash_attention_needs_16_bits() -> None:
    reason = refused(attention="flash_attention_2", dtype="fp32", mixed_precision="no")
    assert "flash-attn has kernels for fp16 and bf16 only" in reason
    # Under autocast q, k and v are 16 bits wide whatever the weights are.
    Recipe(attention="flash_attention_2", dtype="fp32", mixed_precision="bf16")
    Recipe(attention="flash_attention_2", dtype="bf16", mixed_precision="no")


@pytest.mark.parametrize("optimizer", ["rmsprop_bnb", "rmsprop_bnb_32bit", "rmsprop_bnb_8bit"])
def test_rmsprop_of_bitsandbytes_has_no_bf16_kernel(optimizer: str) -> None:
    reason = refused(optimizer=optimizer, dtype="bf16")
    assert f"optimizer {optimizer!r} with dtype 'bf16'" in reason
    assert "Use dtype 'fp32', or optimizer 'rmsprop'" in reason
    Recipe(optimizer=optimizer, dtype="fp32")
    Recipe(optimizer=optimizer, dtype="bf16", lora=LoRA(dtype="fp32"))


def test_rmsprop_in_8_bits_steps_large_bf16_adapters() -> None:
    Recipe(optimizer="rmsprop_bnb_8bit", lora=LoRA(dtype="bf16"))
    assert "lora.dtype 'bf16'" in refused(optimizer="rmsprop_bnb", lora=LoRA(dtype="bf16"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_fp32_weights_and_adapters(optimizer: str) -> None:
    Recipe(optimizer=optimizer, dtype="fp32")
    Recipe(optimizer=optimizer, quantization="nf4", lora=LoRA())


def test_double_quant_is_no_error_where_it_means_nothing() -> None:
    Recipe(quantization="int8", double_quant=True, lora=LoRA())


def test_trainable_dtype() -> None:
    assert trainable_dtype(Recipe(dtype="bf16")) == "bf16"
    assert trainable_dtype(Recipe(dtype="bf16", lora=LoRA(dtype="fp32"))) == "fp32"


def test_cautions() -> None:
    assert cautions(Recipe()) == ()
    (caution,) = cautions(Recipe(dtype="fp16", mixed_precision="no"))
    assert "fp16 without loss scaling" in caution
    assert cautions(Recipe(dtype="fp16", mixed_precision="no", lora=LoRA())) == ()


# Against the libraries themselves, where they are installed.


def test_transformers_refuses_purely_quantized_models() -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")

    class Quantized:
        is_quantized = True
        hf_quantizer = None

    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized"):
        trainer_utils.validate_quantization_for_training(Quantized())


def test_torch_refuses_to_unscale_fp16_gradients() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\."):
        scaler.unscale_(torch.optim.SGD([weight], lr=1.0))
