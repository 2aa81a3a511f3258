"""Runs that `vramplan verify` made on a GPU: against the reference, the prediction, and a cap."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory import allocator
from vramplan.memory.estimate import estimate
from vramplan.recipe.recipe import Recipe

FILE = Path(__file__).resolve().parents[1] / "measured" / "launched_gpu.json"
RUNS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["runs"]
REFERENCED = [run for run in RUNS if run["reference"]]
EMULATED = [run for run in RUNS if run["emulate"]]
WORST, WORST_OFFLOADED = 0.001, 0.005
"""Of the prediction; 3 % was asked for. The one run with weights offloaded was 0.37 % above."""
AS_REFERENCE = 0.005


def name(run: dict[str, Any]) -> str:
    return str(run["id"])


def test_there_are_enough() -> None:
    assert len(RUNS) >= 53
    stages = {(r["recipe"]["deepspeed"] or {}).get("stage") for r in RUNS}
    assert stages == {None, 1, 2, 3}
    assert {r["recipe"]["world_size"] for r in RUNS if not r["pretend_ranks"]} == {1, 2, 4}
    assert len(REFERENCED) >= 18
    assert len({run["model"] for run in RUNS}) >= 9


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_prediction(run: dict[str, Any]) -> None:
    """What is estimated today, of the rank that ran."""
    pretended = run["pretend_ranks"]
    recipe = Recipe.from_dict(run["recipe"])
    card = run.get("gpu", "h200")
    e = estimate(run["model"], recipe, card, rank=0 if pretended else None)
    measured = run["measured"]["peak_allocated"]
    offloads = recipe.deepspeed is not None and recipe.deepspeed.offload_param is not None
    assert abs(e.peak_allocated / measured - 1) <= (WORST_OFFLOADED if offloads else WORST)
    used = measured + run["measured"]["outside_allocator"]
    assert used <= e.required


@pytest.mark.parametrize("run", REFERENCED, ids=name)
def test_launched_figures_equal_the_reference(run: dict[str, Any]) -> None:
    mine, theirs = run["measured"], run["reference"]
    assert mine["peak_allocated"] == pytest.approx(theirs["peak_allocated"], rel=AS_REFERENCE)
    for phase, figures in theirs["phases"].items():
        for what, size in figures.items():
            assert (
                abs(mine["phases"][phase][what] - size) <= AS_REFERENCE * theirs["peak_allocated"]
            )


@pytest.mark.parametrize("run", EMULATED, ids=name)
def test_a_smaller_card_held(run: dict[str, Any]) -> None:
    """They were said to fit 24 GB, ended under that cap, and never had more reserved."""
    card = parse_gpu("24GB")
    recipe = Recipe.from_dict(run["recipe"])
    assert run["emulate"] == card.gpu.capacity
    assert estimate(run["model"], recipe, card).fits
    cap = run["emulate"] - allocator.context(recipe.quantization)
    assert run["measured"]["peak_allocated"] > 0.8 * cap  # close enough to tell
    assert run["measured"]["peak_reserved"] <= cap


def test_launching_costs_no_time() -> None:
    """The same training by hand, by turns: medians of the steps behind the tenth, at most 1 %."""
    document = json.loads(FILE.read_text(encoding="utf-8"))
    timed = next(t for t in document["step_times"] if t["id"] == "llama1b-full-b4-s2048")
    launched, by_hand = (
        median(s for one in timed[how] for s in one[10:]) for how in ("launched", "by_hand")
    )
    assert launched <= 1.01 * by_hand
