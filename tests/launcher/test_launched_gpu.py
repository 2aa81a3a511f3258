"""Runs that `vramplan verify` made on a GPU: against the reference, the prediction, and a cap."""

from __future__ import annotations

import json
from pathlib import Path
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
WORST = 0.001
"""Of the prediction; 3 % was asked for."""
AS_REFERENCE = 0.005


def name(run: dict[str, Any]) -> str:
    return str(run["id"])


def test_there_are_enough() -> None:
    assert len(RUNS) >= 25
    assert len(REFERENCED) >= 18
    assert len({run["model"] for run in RUNS}) >= 9


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_prediction(run: dict[str, Any]) -> None:
    """What is estimated today, of the rank that ran."""
    pretended = run["pretend_ranks"]
    e = estimate(
        run["model"], Recipe.from_dict(run["recipe"]), "h200", rank=0 if pretended else None
    )
    measured = run["measured"]["peak_allocated"]
    assert abs(e.peak_allocated / measured - 1) <= WORST
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
