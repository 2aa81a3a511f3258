from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import estimate
from vramplan.recipe.recipe import Recipe
from vramplan.reports.assumptions import CHECKED_WITH, assumptions
from vramplan.units import GIB

MODEL = "meta-llama/Llama-3.2-1B"


def said(recipe: Recipe = Recipe(), gpu: object = None, model: str = MODEL) -> str:  # noqa: B008
    return "\n".join(assumptions(estimate(model, recipe, gpu=gpu)))  # type: ignore[arg-type]


def test_always_said() -> None:
    text = said(Recipe(seq_len=768))
    assert "in a steady step" in text
    assert "exactly 768 tokens: no padding, no packing" in text
    assert "CUDA context" in text
    assert CHECKED_WITH in text


def test_when_gradients_are_freed() -> None:
    assert "freed after each step." in said()
    assert "freed within backward" in said(Recipe(optimizer="lomo"))
    assert "projections are renewed" in said(Recipe(optimizer="galore_adamw"))


def test_the_allocator() -> None:
    assert "expandable_segments:True is set" in said()
    assert "torch's default allocator, which fragments" in said(Recipe(allocator="default"))


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (None, "64.0 MiB: the card is unknown"),
        ("24GB", "24 GB card: the size as sold"),
        ("rtx-4090", "as torch sizes them for this card"),
        ("rtx-4090", "Nothing else uses the card"),
        ("2xrtx-4090", "The run uses one of the 2 cards"),
    ],
)
def test_the_card(gpu: str | None, words: str) -> None:
    assert words in said(gpu=gpu)


def test_a_card_in_this_machine_is_not_assumed_to_be_free() -> None:
    card = replace(parse_gpu("rtx-4090"), free=GIB, indices=(0,))
    assert "Nothing else uses the card" not in said(gpu=card)


def test_notes_come_last() -> None:
    lines = said(model="Llama-3.2-1B").splitlines()
    assert lines[-1] == "Llama-3.2-1B was read as meta-llama/Llama-3.2-1B."
