"""Predicted step times against measured ones."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from step_time import Timed, by_model, kendall, timed  # noqa: E402

RUNS = timed()
GIVEN = [run for run in RUNS if run.use == "given"]
HELD_OUT = [run for run in RUNS if run.use == "held out"]
SHARED = [run for run in RUNS if run.use == "held out, 4 at a time"]
RANKS = [run for run in RUNS if run.use == "ranks"]
OTHER = [run for run in RUNS if run.use == "other card"]
REPEATS = [run for run in RUNS if run.use == "repeat"]
SMALL = [run for run in RUNS if run.use == "calibration"]


@pytest.mark.parametrize("run", GIVEN, ids=lambda run: run.id)
def test_each_given_run_within_15_percent(run: Timed) -> None:
    assert abs(run.error) <= 0.15


@pytest.mark.parametrize("run", HELD_OUT + REPEATS, ids=lambda run: run.id)
def test_each_other_run_within_20_percent(run: Timed) -> None:
    assert abs(run.error) <= 0.20


@pytest.mark.parametrize("run", SHARED, ids=lambda run: run.id)
def test_runs_beside_others(run: Timed) -> None:
    """Where the host waits for its turn, only so much can be said."""
    launching = run.predicted.parts["launch"] / run.predicted.seconds
    assert abs(run.error) <= (0.15 if launching < 0.05 else 0.45)


@pytest.mark.parametrize("run", RANKS, ids=lambda run: run.id)
def test_runs_on_several_cards_or_with_offload(run: Timed) -> None:
    """DeepSpeed's hooks are fitted to some of these; the rest of their time is not."""
    assert abs(run.error) <= 0.20


@pytest.mark.parametrize("run", OTHER, ids=lambda run: run.id)
def test_an_h100_of_which_only_the_hosts_pace_was_measured(run: Timed) -> None:
    assert abs(run.error) <= 0.10


def test_median_of_what_was_predicted_before_the_runs() -> None:
    """These figures are fixed: no later change of the model can better them. Those of several
    ranks are apart: they led to a rule."""
    runs = HELD_OUT + SHARED
    errors = [abs(run.error_before) for run in runs if run.error_before is not None]
    assert len(errors) == len(runs) >= 49
    assert median(errors) <= 0.10


def test_median_now() -> None:
    for runs in (HELD_OUT, SHARED, RANKS):
        assert median(abs(run.error) for run in runs) <= 0.10


def test_no_bias() -> None:
    assert abs(median(run.error for run in HELD_OUT)) <= 0.05


@pytest.mark.parametrize("model", by_model(RUNS))
def test_order_of_one_models_runs(model: str) -> None:
    mine = by_model(RUNS)[model]
    assert kendall([(run.predicted.seconds, run.measured) for run in mine]) >= 0.85


@pytest.mark.parametrize("run", SMALL, ids=lambda run: run.id)
def test_where_the_card_always_waits(run: Timed) -> None:
    """The host's pace differs by a third from one process to the next; its part is most of it."""
    assert abs(run.error) <= 0.35
    assert run.predicted.parts["launch"] > 0.5 * run.predicted.seconds


def test_kendall() -> None:
    assert kendall([(1, 10), (2, 20), (3, 30)]) == 1
    assert kendall([(1, 30), (2, 20), (3, 10)]) == -1
    assert kendall([(1, 10), (2, 30), (3, 20)]) == pytest.approx(1 / 3)  # two pairs of three agree
