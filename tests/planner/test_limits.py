"""Limits: the last value that fits, and not one more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.errors import UserError
from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import estimate
from vramplan.planner.limits import FURTHEST, largest_batch, last, limits, longest_sequence
from vramplan.recipe.recipe import LoRA, Recipe

CARD = parse_gpu("rtx-4090")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(lora=LoRA()),
        Recipe(lora=LoRA(), quantization="nf4", gradient_checkpointing=True),
        Recipe(gradient_checkpointing=True, batch_size=3),
        Recipe(lora=LoRA(), gradient_accumulation_steps=4, attention="eager"),
    ],
    ids=["lora", "qlora", "full", "eager"],
)
@pytest.mark.parametrize("field", ["seq_len", "batch_size"])
def test_one_more_does_not_fit(recipe: Recipe, field: str) -> None:
    (found,) = limits("meta-llama/Llama-3.2-1B", recipe, CARD, (field,))
    at = estimate("meta-llama/Llama-3.2-1B", found.recipe, CARD)
    assert getattr(found.recipe, field) == found.largest
    assert at.fits
    assert at.required == found.required
    more = replace(found.recipe, **{field: found.largest + 1})
    beyond = estimate("meta-llama/Llama-3.2-1B", more, CARD)
    assert beyond.fits is False
    assert beyond.required == found.beyond


def test_it_never_falls_as_the_sequence_grows() -> None:
    """What halving relies on; Gemma 3's window of 512 begins inside."""
    sizes = [
        estimate("google/gemma-3-1b-pt", Recipe(lora=LoRA(), seq_len=n), CARD).required
        for n in range(480, 560)
    ]
    assert sizes == sorted(sizes)


def test_learned_positions_end_it() -> None:
    found = longest_sequence("openai-community/gpt2", Recipe(lora=LoRA()), "80GB")
    assert found.largest == 1024
    assert found.beyond is None
    assert "1024 learned positions" in found.why


def test_not_even_one() -> None:
    found = largest_batch("meta-llama/Llama-3.1-8B", Recipe(), "24GB")
    assert found.largest == 0
    assert found.required is None
    assert found.beyond is not None
    assert found.beyond > found.available


@pytest.mark.parametrize("true", [1, 2, 3, 7, 8, 9, 99, 100])
def test_last(true: int) -> None:
    asked = []

    def fits(value: int) -> bool:
        asked.append(value)
        return value <= true

    assert last(fits, 100) == true
    assert max(asked) <= 100


def test_another_field_is_refused() -> None:
    with pytest.raises(UserError, match="no limit of rank"):
        limits("openai-community/gpt2", Recipe(), "24GB", ("rank",))
    assert set(FURTHEST) == {"seq_len", "batch_size"}
