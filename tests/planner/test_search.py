"""Evaluating: as estimate() says, pruned or not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.errors import UserError
from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import estimate, resolve
from vramplan.models.architecture import Architecture
from vramplan.planner.candidates import FITS, HOST, TOO_LARGE, Candidate
from vramplan.planner.clock import seconds_of
from vramplan.planner.goal import Goal
from vramplan.planner.plan import fit, plan_for
from vramplan.planner.rank import best_of, front, picked
from vramplan.planner.search import Evaluator, Searched, judged, nearest_misses, search
from vramplan.planner.space import Draft, Space
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.units import GIB


def searched(
    arch: Architecture,
    card: str,
    goal: Goal = Goal(),  # noqa: B008
    *,
    host: int | None = None,
    pruning: bool = True,
) -> Searched:
    gpus = parse_gpu(card)
    space = Space(arch, gpus.gpu, gpus.count, goal)
    return search(space, Evaluator(arch, gpus, host), seconds_of, pruning=pruning)


@pytest.mark.parametrize(
    ("model", "card"),
    [
        ("meta-llama/Llama-3.2-1B", "rtx-4090"),
        ("google/gemma-3-1b-pt", "2xh100-80gb"),
        ("openai-community/gpt2", "24GB"),
    ],
)
def test_what_is_needed_is_what_the_facade_says(model: str, card: str) -> None:
    _, arch, _ = resolve(model)
    gpus = parse_gpu(card)
    evaluator = Evaluator(arch, gpus)
    goal = Goal(effective_batch=4, allow_8bit_optim=True)
    drafts = list(Space(arch, gpus.gpu, gpus.count, goal, whole=False).drafts())
    for draft in drafts[::3]:
        mine = evaluator.needed(draft.recipe)
        said = estimate(arch, draft.recipe, gpus)
        assert (mine.required, mine.managed, mine.fits) == (said.required, said.managed, said.fits)
        assert evaluator.floor(draft.recipe) <= said.required


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor"])
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-30B-A3B"])
def test_floors_under_zero_are_below_what_is_needed(model: str, optimizer: str) -> None:
    _, arch, _ = resolve(model)
    gpus = parse_gpu("4xh100-80gb")
    evaluator = Evaluator(arch, gpus)
    floors = {}
    for stage in (1, 2, 3):
        pins = {"zero": stage, "optimizer": optimizer, "gradient_checkpointing": True}
        goal = Goal(effective_batch=4, seq_len=64, pins=pins)
        for draft in Space(arch, gpus.gpu, gpus.count, goal, whole=False).drafts():
            try:
                needed = evaluator.needed(draft.recipe).required
            except UserError:
                continue
            floor = evaluator.floor(draft.recipe)
            assert floor <= needed
            floors[draft.recipe] = floor / needed
    assert max(floors.values()) > 0.5


@pytest.mark.parametrize(
    ("model", "card"),
    [("meta-llama/Llama-3.1-8B", "24GB"), ("meta-llama/Llama-3.2-1B", "2xrtx-4090")],
)
def test_looking_for_the_pick_alone_finds_the_same(model: str, card: str) -> None:
    """And evaluates less: a method that has a plan on the cards ends the search."""
    plan = fit(model, card)
    alone = plan_for(plan, plan.gpus)
    assert alone.pick == plan.pick
    assert alone.evaluated < plan.evaluated


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "openai-community/gpt2-medium"])
@pytest.mark.parametrize("card", ["12GB", "rtx-4090"])
def test_pruning_changes_nothing(model: str, card: str) -> None:
    _, arch, _ = resolve(model)
    goal = Goal(effective_batch=4, seq_len=1024)
    fast = searched(arch, card, goal)
    slow = searched(arch, card, goal, pruning=False)
    assert slow.evaluated > 2 * fast.evaluated
    assert picked(slow.candidates, goal) == picked(fast.candidates, goal)
    for method in ("full", "lora", "int8", "qlora"):
        mine, whole = (
            [c for c in found.candidates if c.method == method] for found in (fast, slow)
        )
        assert best_of(mine, goal) == best_of(whole, goal)
        # Beyond the pruned ones there is at most what fused step counts weigh.
        best = front(mine, goal)
        for c in front(whole, goal):
            assert any(
                b.footprint <= c.footprint * 1.0001 and (b.seconds or 0) <= (c.seconds or 0) * 1.001
                for b in best
            ), c


def test_what_a_smaller_micro_batch_already_exceeds(llama_8b: Architecture) -> None:
    """It is a bound of what is needed, also where accumulation ends and gradients no longer wait;
    of another run it says nothing."""
    evaluator = Evaluator(llama_8b, parse_gpu("24GB"))
    for recipe in (Recipe(), Recipe(lora=LoRA(), gradient_checkpointing=True)):
        before: Candidate | None = None
        for batch, steps in ((1, 8), (2, 4), (4, 2), (8, 1)):
            now = replace(recipe, batch_size=batch, gradient_accumulation_steps=steps)
            found = judged(Draft("full", now, "", ""), evaluator, pruning=False)
            bound = evaluator.outgrown(now, before)
            assert found.required is not None
            assert bound <= found.required
            assert bound > 0 or before is None
            before = found
        assert evaluator.outgrown(replace(now, dtype="fp32"), before) == 0


def test_verdicts_agree_with_the_sizes(llama_8b: Architecture) -> None:
    found = searched(llama_8b, "rtx-4090", host=64 * GIB).candidates
    for c in found:
        if c.verdict == FITS:
            assert c.required is not None
            assert c.available is not None
            assert c.required <= c.available
            assert c.host <= 64 * GIB
            assert c.seconds is not None
            assert c.seconds > 0
            assert c.tokens == 16 * 2048
        elif c.verdict == TOO_LARGE:
            assert c.too_much > 0
        elif c.verdict == HOST:
            assert c.host > 64 * GIB
        else:
            assert c.required is None
            assert c.why
    assert {c.verdict for c in found} >= {FITS, TOO_LARGE, HOST}


def test_nearest_misses_are_exact_and_nearest(llama_8b: Architecture) -> None:
    goal = Goal(pins={"zero": None})
    found = searched(llama_8b, "8GB", goal)
    whole = searched(llama_8b, "8GB", goal, pruning=False)
    misses = {
        c.method: c for c in nearest_misses(found.candidates, Evaluator(llama_8b, parse_gpu("8GB")))
    }
    for method in ("full", "lora", "int8"):
        least = min(
            c.required for c in whole.candidates if c.method == method and c.required is not None
        )
        assert least <= (misses[method].required or 0) <= least * 1.0001
        assert not misses[method].at_least


def test_paged_states_without_room_cost_time(llama_1b: Architecture) -> None:
    """12 GiB have no room for 10 GB of fp32 states beside the rest: they move twice a step."""
    pins = {"optimizer": "paged_adamw_32bit", "zero": None, "batch_size": 1}
    goal = Goal(methods=("full",), pins=pins)
    small = {c.recipe: c for c in searched(llama_1b, "12GB", goal).candidates if c.fits}
    large = {c.recipe: c for c in searched(llama_1b, "48GB", goal).candidates if c.fits}
    assert small
    for recipe, candidate in small.items():
        assert candidate.paged_out > 0
        assert not candidate.stays
        assert not candidate.offloads
        assert candidate.footprint == candidate.available
        assert large[recipe].paged_out == 0
        assert (candidate.seconds or 0) > (large[recipe].seconds or 0)
