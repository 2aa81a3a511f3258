"""The plans that fit picks, against the real runs in tests/measured/choice.json."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

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
    document, runs = choice.read()
    kept = list(choice.promised(document, runs))
    assert len(kept) == 18
    assert [run for run, _, fits, survived in kept if fits and not survived] == []
    assert sum(fits for _, _, fits, _ in kept) >= 16


def test_the_pick_costs_at_most_a_twentieth_more(choice: ModuleType) -> None:
    document, runs = choice.read()
    made = list(choice.choices(document, runs))
    regrets = [c.regret for c in made if c.regret is not None]
    assert len(regrets) >= 3
    assert max(regrets) <= 1.05


def test_the_runs_are_what_they_say_they_are(choice: ModuleType) -> None:
    """Their peaks tell which ran with autocast: predicted for what they say, to a page."""
    from vramplan import estimate

    document, runs = choice.read()
    for run in runs:
        said = estimate(run.model, run.timed, choice.card(document, 80)).peak_allocated
        assert abs(said - run.peak_allocated) < 4096


def test_the_page_is_what_the_runs_say(choice: ModuleType) -> None:
    text = choice.page(*choice.read())
    assert "ran out of memory.**" in " ".join(text.split())
    page = (ROOT / "docs" / "choice.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] == text.splitlines()[0]
    assert len(page.splitlines()) == len(text.splitlines())
