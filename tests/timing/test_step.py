"""step_time: its parts, and what makes a step longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.errors import IllegalRecipe
from vramplan.hardware.catalogue import parse_gpu
from vramplan.models.architecture import Architecture
from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.timing.step import StepTime, step_time

H200 = parse_gpu("h200")
QLORA = Recipe(quantization="nf4", lora=LoRA(), gradient_checkpointing=True)
RECIPES = (
    Recipe(),
    Recipe(gradient_checkpointing=True),
    Recipe(attention="eager"),
    Recipe(dtype="fp32", mixed_precision="no"),
    Recipe(dtype="fp32", mixed_precision="fp16"),
    Recipe(lora=LoRA()),
    Recipe(quantization="int8", lora=LoRA()),
    QLORA,
)


def of(arch: Architecture, recipe: Recipe, gpu: str = "h200") -> StepTime:
    return step_time(arch, recipe, parse_gpu(gpu))


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("gpu", ["h200", "a100-80gb", "t4", "24GB"])
def test_parts_add_up(llama: Architecture, recipe: Recipe, gpu: str) -> None:
    step = of(llama, recipe, gpu)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert all(seconds >= 0 for seconds in step.parts.values())
    assert step.tokens == 2048
    assert step.tokens_per_second == pytest.approx(2048 / step.seconds)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_longer_with_every_sequence_and_every_token(llama: Architecture, recipe: Recipe) -> None:
    batches = [of(llama, replace(recipe, batch_size=b)).seconds for b in (1, 2, 3, 8, 16, 64)]
    lengths = [of(llama, replace(recipe, seq_len=s)).seconds for s in (64, 512, 1024, 4096, 16384)]
    assert batches == sorted(set(batches))
    assert lengths == sorted(set(lengths))


def test_a_long_sequence_costs_more_than_as_many_short_ones(llama: Architecture) -> None:
    long = of(llama, Recipe(batch_size=1, seq_len=32768))
    short = of(llama, Recipe(batch_size=32, seq_len=1024))
    assert long.tokens == short.tokens
    assert long.seconds > 1.2 * short.seconds


def test_adapters_everywhere_can_cost_more_than_they_spare(llama: Architecture) -> None:
    """Of a 1B model: measured 207 ms against 174 in full, batch 4 x 2048."""
    recipe = Recipe(batch_size=4)
    full, lora = (of(llama, replace(recipe, lora=x)).seconds for x in (None, LoRA(rank=16)))
    assert lora > 1.1 * full


def test_checkpointing_adds_a_forward_of_the_layers(llama: Architecture) -> None:
    recipe = Recipe(batch_size=8)
    plain, again = (of(llama, replace(recipe, gradient_checkpointing=g)) for g in (False, True))
    assert plain.parts["recompute"] == 0
    assert again.parts["backward"] == pytest.approx(plain.parts["backward"], rel=0.05)
    assert 0.5 < again.parts["recompute"] / plain.parts["forward"] < 1


def test_adapters_spare_backward_and_the_update(llama: Architecture) -> None:
    adapters = LoRA(dropout=0.0, target_modules=("q_proj", "v_proj"))
    full, lora = of(llama, Recipe(batch_size=8)), of(llama, Recipe(batch_size=8, lora=adapters))
    assert lora.parts["backward"] < full.parts["backward"]
    assert lora.parts["optimizer"] < 0.1 * full.parts["optimizer"]


def test_quantized_weights_cost_time(llama: Architecture) -> None:
    lora = Recipe(batch_size=4, lora=LoRA())
    plain = of(llama, lora).seconds
    four = of(llama, replace(lora, quantization="nf4"))
    eight = of(llama, replace(lora, quantization="int8"))
    assert four.parts["dequantize"] > 0
    assert plain < four.seconds < eight.seconds


def test_fp32_without_tensor_cores_is_many_times_slower(llama: Architecture) -> None:
    fast = of(llama, Recipe(batch_size=4)).seconds
    slow = of(llama, Recipe(batch_size=4, dtype="fp32", mixed_precision="no")).seconds
    assert slow > 5 * fast


def test_a_small_batch_waits_for_the_host(llama: Architecture) -> None:
    small, large = of(llama, Recipe(seq_len=64)), of(llama, Recipe(batch_size=16))
    assert small.parts["launch"] > 0.5 * small.seconds
    assert large.parts["launch"] < 0.05 * large.seconds


def test_accumulation_updates_once(llama: Architecture) -> None:
    one = of(llama, Recipe(batch_size=4))
    four = of(llama, Recipe(batch_size=4, gradient_accumulation_steps=4))
    assert four.parts["optimizer"] == one.parts["optimizer"]
    assert four.parts["forward"] == pytest.approx(4 * one.parts["forward"])
    assert four.tokens == 4 * one.tokens
    assert 3.5 * one.seconds < four.seconds < 4 * one.seconds


def test_better_cards_are_faster(llama: Architecture) -> None:
    order = ("t4", "a10", "a100-80gb", "h100-80gb", "h200")
    times = [of(llama, Recipe(batch_size=2), gpu).seconds for gpu in order]
    assert times == sorted(times, reverse=True)


def test_a_bare_size_is_timed_with_a_note(llama: Architecture) -> None:
    step = of(llama, QLORA, "24GB")
    assert step.seconds > 0
    assert "24" in step.notes[0]
    assert of(llama, QLORA).notes == ()


def test_every_optimizer(llama: Architecture) -> None:
    times = {}
    for name in OPTIMIZERS:
        try:
            times[name] = of(llama, Recipe(optimizer=name)).parts["optimizer"]
        except IllegalRecipe:
            continue  # of 16-bit weights, say
    assert len(times) > 20
    assert times["sgd"] < times["adamw_torch_fused"] < times["adamw_torch"]
    assert times["adamw_torch"] < times["adamw_8bit"] < times["adafactor"]


def test_measured_updates(llama: Architecture) -> None:
    """1,235,814,400 parameters in bf16; clipping takes 2.9 ms."""
    clip = 2.9e-3
    for name, measured in (
        ("adamw_torch_fused", 6.4e-3),
        ("adamw_torch", 16.2e-3),
        ("adafactor", 47.1e-3),
    ):
        update = of(llama, Recipe(optimizer=name)).parts["optimizer"]
        assert update == pytest.approx(measured + clip, rel=0.1)
