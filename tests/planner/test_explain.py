"""What lies next to a plan, and which card to take."""

from __future__ import annotations

import pytest

from vramplan.hardware.catalogue import all_gpus, parse_gpu
from vramplan.hardware.gpu import Gpus
from vramplan.planner.cards import next_larger, smallest_with
from vramplan.planner.explain import differences, larger_card, more_cards, smallest_card
from vramplan.planner.goal import Goal
from vramplan.planner.plan import fit
from vramplan.planner.which import cheapest_by_method, which_gpu
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.units import GIB

MODEL = "meta-llama/Llama-3.2-1B"


def test_the_next_larger_card() -> None:
    for gpu in all_gpus():
        found = next_larger(Gpus(gpu=gpu))
        if found is not None:
            assert found.vendor == gpu.vendor
            assert found.capacity > gpu.capacity
    after = next_larger(parse_gpu("rtx-4090"))
    assert after is not None
    assert 30 * GIB < after.capacity < 33 * GIB


def test_the_smallest_card_with_room() -> None:
    found = smallest_with(30 * GIB)
    assert found is not None
    assert found.capacity >= 30 * GIB
    assert all(
        gpu.capacity >= found.capacity or gpu.capacity < 30 * GIB
        for gpu in all_gpus()
        if gpu.vendor == "nvidia"
    )


def test_steps_from_a_plan() -> None:
    plan = fit(MODEL, "8GB", Goal(effective_batch=2, pins={"zero": None}))
    assert plan.pick is not None
    assert plan.pick.method == "lora" or plan.pick.method == "full"
    larger, more = larger_card(plan), more_cards(plan)
    assert larger is not None
    assert larger.gpus.nominal
    assert larger.gpus.gpu.memory > 8 * GIB
    assert larger.cost is not None
    assert larger.cost <= 1.01
    assert more is not None
    assert more.gpus.count == 2
    assert more_cards(fit(MODEL, "2x8GB", Goal(effective_batch=2))) is None  # no batch for three


def test_the_smallest_card_for_what_does_not_fit() -> None:
    plan = fit("meta-llama/Llama-3.1-8B", "6GB", Goal(methods=("lora",), pins={"zero": None}))
    found = smallest_card(plan)
    assert found is not None
    gpu, miss = found
    assert miss == plan.misses["lora"]
    assert gpu.capacity >= (miss.required or 0)


def test_differences_in_words() -> None:
    base = Recipe(lora=LoRA())
    assert differences(base, base) == []
    other = Recipe(
        lora=LoRA(),
        quantization="nf4",
        gradient_checkpointing=True,
        batch_size=4,
        deepspeed=DeepSpeed(stage=2, offload_optimizer="cpu"),
        world_size=2,
    )
    assert differences(other, base) == [
        "2 cards",
        "nf4 weights",
        "checkpointing",
        "micro-batch 4",
        "ZeRO-2, optimizer offloaded",
    ]


def test_which_gpu_of_some() -> None:
    goal = Goal(methods=("qlora",), effective_batch=2, price=1.0)
    offers = which_gpu("meta-llama/Llama-3.1-8B", goal, ["rtx-3060", "rtx-4090", "h100-80gb"])
    assert {offer.gpus.gpu.id for offer in offers} <= {"rtx-3060", "rtx-4090", "h100-80gb"}
    dollars = [offer.cost.dollars or 0 for offer in offers]
    assert dollars == sorted(dollars)
    best = offers[0]
    assert best.cost.dollars == pytest.approx(best.cost.gpu_hours)
    assert cheapest_by_method(offers) == {"qlora": best}
    for offer in offers:
        assert (offer.pick.required or 0) <= offer.gpus.gpu.capacity
        assert offer.pick.cards == offer.gpus.count


def test_which_gpu_finds_none() -> None:
    pins = {"zero": None, "world_size": 1}
    assert which_gpu("meta-llama/Llama-3.1-405B", Goal(methods=("full",), pins=pins), "8GB") == []
