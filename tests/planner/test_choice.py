"""What is said to fit and what is picked, against real runs on a capped card (choice.json)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from choice import Capped, Choice, capped, choices, page, read  # noqa: E402

DOCUMENT = read()
RUNS = capped(DOCUMENT)
CHOICES = choices(RUNS, DOCUMENT["card"])
UNKNOWN = 1
"""Picks that were not run: int8 LoRA on 48 GiB."""


def test_nothing_that_was_said_to_fit_ran_out_of_memory() -> None:
    assert len(RUNS) >= 77
    assert [run for run in RUNS if run.said_to_fit and not run.ended] == []
    # Nor is everything refused: of those that survived, few were said not to fit.
    assert sum(run.ended and not run.said_to_fit for run in RUNS) <= 4


@pytest.mark.parametrize("run", [run for run in RUNS if run.peak_allocated], ids=str)
def test_the_peaks_of_the_runs_are_as_predicted(run: Capped) -> None:
    """They ran the recipe that they say. int8's outliers depend on the weights."""
    within = 0.002 if run.recipe.quantization == "int8" else 0.0001
    assert run.predicted_peak == pytest.approx(run.peak_allocated, rel=within)


@pytest.mark.parametrize(
    "choice", CHOICES, ids=lambda c: f"{c.job.name} {c.cap} GiB".replace(" ", "-")
)
def test_a_pick_survives_and_costs_little_more_than_the_best(choice: Choice) -> None:
    if choice.picked is not None:
        assert choice.picked.ended
        assert choice.regret is not None
        assert choice.regret <= 1.05


def test_picks_were_run() -> None:
    assert sum(choice.picked is None for choice in CHOICES) == UNKNOWN
    assert len({choice.job.model for choice in CHOICES}) >= 3


def test_the_page_is_of_these_runs() -> None:
    assert page(DOCUMENT) == (BENCHMARKS.parent / "docs" / "choice.md").read_text(encoding="utf-8")
