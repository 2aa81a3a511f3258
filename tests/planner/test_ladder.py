"""The ladder: rungs that save, on top of each other."""

from __future__ import annotations

import json

import pytest

from vramplan.memory.estimate import estimate
from vramplan.planner.ladder import START, Ladder, ladder, start_of
from vramplan.recipe.recipe import LoRA, Recipe


@pytest.fixture(scope="module")
def found() -> Ladder:
    return ladder("meta-llama/Llama-3.2-1B", start_of({"batch_size": 2}), "rtx-4090")


def test_it_begins_where_nothing_is_saved(found: Ladder) -> None:
    first = found.rungs[0]
    assert {name: getattr(first.recipe, name) for name in START} == START
    assert first.saving == 0
    assert first.fits is False


def test_each_rung_is_the_estimate_of_its_recipe(found: Ladder) -> None:
    for before, rung in zip(found.rungs, found.rungs[1:], strict=False):
        said = estimate("meta-llama/Llama-3.2-1B", rung.recipe, "rtx-4090")
        assert (rung.required, rung.fits) == (said.required, said.fits)
        assert rung.saving == before.required - rung.required
        assert rung.recipe != before.recipe
        assert rung.flags


def test_a_rung_saves_memory_or_time(found: Ladder) -> None:
    for before, rung in zip(found.rungs, found.rungs[1:], strict=False):
        assert rung.saving > 0 or (rung.seconds or 0) < (before.seconds or 0), rung.name
    assert {name for name, _ in found.skipped}.isdisjoint(rung.name for rung in found.rungs)


def test_what_costs_quality_is_marked(found: Ladder) -> None:
    marked = {rung.name for rung in found.rungs if rung.alters_training}
    assert {"LoRA", "nf4 weights"} <= marked
    assert marked.isdisjoint({"checkpointing", "sdpa attention", "expandable segments"})


def test_the_checklist_is_by_impact(found: Ladder) -> None:
    savings = [change.saving for change in found.checklist]
    assert savings == sorted(savings, reverse=True)
    assert savings


def test_without_a_card_and_from_a_recipe() -> None:
    base = Recipe(lora=LoRA(), seq_len=512)
    bare = ladder("openai-community/gpt2", base)
    assert bare.rungs[0].recipe == base
    assert all(rung.fits is None and rung.seconds is None for rung in bare.rungs)
    assert json.loads(json.dumps(bare.to_dict()))["gpu"] is None
