"""Ranking, on candidates made for it."""

from __future__ import annotations

from dataclasses import replace

from vramplan.planner.candidates import FITS, TOO_LARGE, Candidate
from vramplan.planner.goal import Goal
from vramplan.planner.rank import best_of, best_of_methods, dominator, front, picked, ranked
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

COST, TIME = Goal(), Goal(objective="time")


def plan(
    seconds: float, required: int, method: str = "full", cards: int = 1, **more: object
) -> Candidate:
    lora = None if method == "full" else LoRA()
    quantization = {"int8": "int8", "qlora": "nf4"}.get(method)
    recipe = Recipe(lora=lora, quantization=quantization, world_size=cards)  # type: ignore[arg-type]
    values = {"verdict": FITS, "available": 10_000} | more
    return Candidate(
        method=method,
        recipe=recipe,
        required=required,
        seconds=seconds,
        tokens=1,
        **values,  # type: ignore[arg-type]
    )


def offloaded(candidate: Candidate) -> Candidate:
    zero = DeepSpeed(stage=2, offload_optimizer="cpu")
    return replace(candidate, recipe=replace(candidate.recipe, deepspeed=zero))


def test_the_cheapest_is_taken_not_the_quickest() -> None:
    one, two = plan(10.0, 500), plan(6.0, 500, cards=2)  # 10 and 12 card-seconds
    assert best_of([two, one], COST) is one
    assert best_of([two, one], TIME) is two


def test_of_equal_costs_the_quickest_then_the_smallest() -> None:
    one, two = plan(10.0, 300), plan(5.04, 500, cards=2)  # 0.8 % dearer
    assert best_of([one, two], COST) is two
    large, small = plan(10.0, 500), plan(10.05, 300)
    assert best_of([large, small], COST) is small
    assert best_of([large, plan(10.2, 300)], COST) is large  # 2 % are not equal


def test_paged_states_count_as_memory() -> None:
    """A paged optimizer's states lie on the card while there is room."""
    plain = plan(10.0, 500)
    paged = plan(10.0, 400, managed=200)
    assert paged.footprint == 600
    assert best_of([paged, plain], COST) is plain
    assert plan(10.0, 400, managed=200, paged_out=150).footprint == 450


def test_quality_comes_before_cost() -> None:
    full, lora = plan(20.0, 900), plan(10.0, 300, "lora")
    assert picked([lora, full], COST) is full
    assert list(best_of_methods([lora, full], COST)) == ["full", "lora"]


def test_host_memory_comes_after_all_methods_that_stay() -> None:
    full, qlora = offloaded(plan(20.0, 900)), plan(10.0, 300, "qlora")
    assert picked([full, qlora], COST) is qlora
    assert picked([full], COST) is full
    assert picked([], COST) is None


def test_within_a_method_too_what_stays_comes_first() -> None:
    stays, away = plan(10.0, 500), offloaded(plan(9.0, 400, host=50))
    assert best_of([stays, away], COST) is stays
    assert front([stays, away], COST) == [away, stays]  # neither beats the other
    assert best_of([away], COST) is away


def test_what_does_not_fit_is_not_ranked() -> None:
    large = plan(1.0, 20_000, verdict=TOO_LARGE)
    assert ranked([large], COST) == []
    assert picked([large], COST) is None


def test_the_front_is_what_nothing_beats() -> None:
    cheap, middle, small = plan(10.0, 900), plan(12.0, 500), plan(20.0, 100)
    beaten = plan(12.5, 600)
    found = front([small, beaten, middle, cheap], COST)
    assert found == [cheap, middle, small]
    assert dominator(beaten, found, COST) is middle
    assert dominator(middle, found, COST) is None


def test_time_is_on_the_front_too() -> None:
    one, two = plan(10.0, 500), plan(6.0, 500, cards=2)
    assert front([one, two], COST) == [one, two]


def test_the_pick_is_never_dominated() -> None:
    values = [(10.0, 900), (10.05, 890), (10.09, 500), (10.2, 100), (10.0, 900), (9.99, 895)]
    candidates = [plan(seconds, required) for seconds, required in values]
    best = best_of(candidates, COST)
    assert best is not None
    assert any(c == best for c in front(candidates, COST))
