"""What is said to fit, against real runs on a capped card (tests/measured/choice.json)."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vramplan import Recipe, estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def choice() -> ModuleType:
    spec = spec_from_file_location("choice", ROOT / "benchmarks" / "choice.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["choice"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_nothing_that_was_said_to_fit_ran_out_of_memory(choice: ModuleType) -> None:
    runs = choice.capped(choice.read())
    assert len(runs) == 18
    assert [run for run in runs if run.said_to_fit and not run.ended] == []
    # Nor is everything refused: of the 17 that survived, at most one was said not to fit.
    assert sum(run.ended and not run.said_to_fit for run in runs) <= 1


def test_the_peaks_of_the_timed_runs_are_as_predicted(choice: ModuleType) -> None:
    """To a page: they ran the recipe that they say, autocast included."""
    document = choice.read()
    assert len(document["timed"]) == 3
    for run in document["timed"]:
        recipe = Recipe.from_dict(run["recipe"])
        said = estimate(run["model"], recipe, choice.card(document, 80)).peak_allocated
        assert abs(said - run["peak_allocated"]) < 4096


def test_no_pick_is_known_to_run_out_of_memory(choice: ModuleType) -> None:
    document = choice.read()
    fared = {row[-1] for row in choice.picks(document, choice.capped(document))}
    assert "ran out of memory" not in fared
    assert "survived" in fared
