"""What would help: every figure is a new estimate's, and what is offered can be run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from vramplan.cli.recipe_options import recipe_of, recipe_options
from vramplan.memory.advice import SHORTEST, Change, advise, combine, recipe_flags
from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.recipe import LoRA, Recipe

LARGE, SMALL = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"


def by_name(needed: Estimate) -> dict[str, Change]:
    return {change.name: change for change in advise(needed)}


@pytest.fixture(scope="module")
def large() -> Estimate:
    return estimate(LARGE, Recipe(), gpu="24GB")


def test_changes_come_in_order_of_gain_and_all_gain(large: Estimate) -> None:
    savings = [change.saving for change in advise(large)]
    assert savings == sorted(savings, reverse=True)
    assert min(savings) > 0


def test_every_figure_is_that_recipes_own_estimate(large: Estimate) -> None:
    for change in advise(large):
        alone = estimate(LARGE, change.recipe, gpu="24GB")
        assert change.required == alone.required
        assert change.saving == large.required - alone.required
        assert change.fits is alone.fits
        assert change.managed == alone.managed


def test_the_changes_of_a_full_fine_tuning(large: Estimate) -> None:
    assert {name: change.flags for name, change in by_name(large).items()} == {
        "checkpointing": ("--gradient-checkpointing",),
        "8-bit states": ("--optimizer", "adamw_8bit"),
        "paged 8-bit states": ("--optimizer", "paged_adamw_8bit"),
        "LoRA": ("--lora",),
        "QLoRA (nf4)": ("--quantization", "nf4", "--lora"),
        "half the sequence": ("--seq-len", "1024"),
    }


def test_what_alters_training_says_so(large: Estimate) -> None:
    altering = {name for name, change in by_name(large).items() if change.alters_training}
    rounded = {"8-bit states", "paged 8-bit states"}
    assert altering == {"LoRA", "QLoRA (nf4)", "half the sequence", *rounded}


def test_a_smaller_batch_keeps_the_samples_of_a_step() -> None:
    recipe = Recipe(lora=LoRA(), batch_size=6, gradient_accumulation_steps=5)
    change = by_name(estimate(SMALL, recipe))["half the batch"]
    assert change.recipe == replace(recipe, batch_size=3, gradient_accumulation_steps=10)
    assert change.flags == ("--batch-size", "3", "--gradient-accumulation-steps", "10")
    assert not change.alters_training


def test_a_batch_that_has_no_half() -> None:
    change = by_name(estimate(SMALL, Recipe(lora=LoRA(), batch_size=9)))["1/3 of the batch"]
    assert (change.recipe.batch_size, change.recipe.gradient_accumulation_steps) == (3, 3)


def test_what_is_done_already_is_not_offered() -> None:
    recipe = Recipe(
        lora=LoRA(dropout=0.0),
        quantization="nf4",
        gradient_checkpointing=True,
        optimizer="paged_lion_8bit",
        seq_len=2 * SHORTEST - 1,
    )
    assert advise(estimate(SMALL, recipe)) == ()


def test_the_changes_of_what_was_chosen_unluckily() -> None:
    recipe = Recipe(dtype="fp32", attention="eager", allocator="default", lora=LoRA())
    found = by_name(estimate(SMALL, recipe))
    assert found["sdpa attention"].flags == ("--attention", "sdpa")
    assert found["bf16 weights"].flags == ("--dtype", "bf16")
    assert found["expandable segments"].flags == ("--allocator", "expandable_segments")
    assert found["no LoRA dropout"].flags == ("--lora-dropout", "0")
    assert found["nf4 weights"].flags == ("--quantization", "nf4")
    # Frozen weights are only rounded; trained ones lose what is less than half a step of bf16.
    assert not found["bf16 weights"].alters_training
    full = by_name(estimate(SMALL, Recipe(dtype="fp32")))
    assert full["bf16 weights"].alters_training


def test_what_the_libraries_refuse_is_left_out() -> None:
    # bf16 weights, fully trained under fp16 autocast: the gradient scaler refuses.
    recipe = Recipe(dtype="fp32", mixed_precision="fp16")
    assert "bf16 weights" not in by_name(estimate(SMALL, recipe))
    # bitsandbytes steps no 8-bit RMSprop with bf16 gradients.
    assert "8-bit states" not in by_name(estimate(SMALL, Recipe(optimizer="rmsprop")))


def test_without_a_gpu_there_is_no_verdict_and_no_combination() -> None:
    needed = estimate(SMALL, Recipe())
    assert {change.fits for change in advise(needed)} == {None}
    assert combine(needed) is None


def test_what_fits_needs_no_combination() -> None:
    assert combine(estimate(SMALL, Recipe(), gpu="80GB")) is None


def test_a_combination_fits_and_holds_nothing_needless(large: Estimate) -> None:
    found = combine(large)
    assert found is not None
    assert found.fits
    assert found.alters_training
    assert found.required == estimate(LARGE, found.recipe).required
    assert found.recipe == Recipe(lora=LoRA(), gradient_checkpointing=True)
    assert found.name == "checkpointing, LoRA"
    for field in ("lora", "gradient_checkpointing"):
        less = replace(found.recipe, **{field: getattr(Recipe(), field)})
        assert not estimate(LARGE, less, gpu="24GB").fits


def test_training_is_altered_only_if_nothing_else_suffices() -> None:
    needed = estimate(SMALL, Recipe(batch_size=16), gpu="24GB")
    assert needed.fits is False
    found = combine(needed)
    assert found is not None
    assert not found.alters_training
    assert found.recipe.lora is None
    assert found.recipe.seq_len == 2048


def test_the_sequence_is_shortened_last() -> None:
    recipe = Recipe(lora=LoRA(), seq_len=131_072, gradient_checkpointing=True)
    needed = estimate(LARGE, recipe, gpu="24GB")
    assert needed.fits is False
    found = combine(needed)
    assert found is not None
    assert found.fits
    assert found.recipe.seq_len < 131_072
    assert f"{found.recipe.seq_len} tokens" in found.name


def test_what_can_not_be_made_to_fit() -> None:
    needed = estimate("meta-llama/Llama-3.1-405B", Recipe(), gpu="8GB")
    assert combine(needed) is None
    assert advise(needed)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(lora=LoRA()),
        Recipe(lora=LoRA(rank=8, alpha=12.5, dropout=0.0, dtype="bf16")),
        Recipe(lora=LoRA(target_modules=("q_proj", "v_proj")), quantization="int8"),
        Recipe(lora=LoRA(), quantization="fp4", double_quant=False),
        Recipe(
            dtype="fp32",
            mixed_precision="fp16",
            attention="eager",
            gradient_checkpointing=True,
            optimizer="adafactor",
            batch_size=3,
            seq_len=512,
            gradient_accumulation_steps=4,
            allocator="default",
        ),
    ],
)
def test_flags_make_the_recipe_again(recipe: Recipe) -> None:
    assert _parsed(recipe_flags(recipe)) == recipe


def test_flags_that_undo() -> None:
    base = Recipe(lora=LoRA(), quantization="nf4", gradient_checkpointing=True)
    assert recipe_flags(Recipe(), base) == (
        "--quantization",
        "none",
        "--no-lora",
        "--no-gradient-checkpointing",
    )


def _parsed(flags: tuple[str, ...]) -> Recipe:
    import click

    found = []

    @click.command()
    @recipe_options
    def parse(**given: object) -> None:
        found.append(recipe_of(None, given))

    result = CliRunner().invoke(parse, flags)
    assert result.exit_code == 0, result.output
    return found[0]
