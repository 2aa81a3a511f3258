"""The archive of runs, and what estimates take from it: nothing but what is outside torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher import archive

from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.measured_overheads import OVERHEADS, data_folder, overhead_of
from vramplan.units import MIB


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def measurement(
    outside: int | None, *, quantization: str | None = None, ranks: int = 1, **more: Any
) -> dict[str, Any]:
    return {
        "name": "a",
        "when": "2026-01-01T00:00:00Z",
        "outcome": "ended",
        "environment": {
            "device": "NVIDIA H200",
            "device_memory": 150_754_820_096,
            "driver": "580.1",
            "torch": "2.11",
        },
        "job": {"pretend_ranks": None},
        "recipe": {"quantization": quantization, "world_size": ranks},
        "ranks": [{"rank": 0, "outside_allocator": outside, "timeline": [1]}],
        "training": {"losses": [1], "seconds_between_steps": [1]},
        **more,
    }


def test_runs_join_without_what_is_long() -> None:
    path = archive.join(measurement(758 * MIB))
    assert path.parent == data_folder() / "runs"
    (run,) = archive.runs()
    assert run["training"] == {}
    assert "timeline" not in run["ranks"][0]
    (path.parent / "broken.json").write_text("{")
    assert len(archive.runs()) == 1


def test_the_most_outside_is_used_for_that_card_alone() -> None:
    card = parse_gpu("h200")
    assert overhead_of(card, None) is None
    archive.join(measurement(742 * MIB))
    archive.join(measurement(758 * MIB))
    archive.join(measurement(750 * MIB))
    found = overhead_of(card, None)
    assert found is not None
    assert (found.context, found.nccl) == (758 * MIB, None)
    assert found.source == "measured here in 3 runs, driver 580.1, torch 2.11"
    assert overhead_of(card, "int8") is None
    assert overhead_of(card, None, zero=True) is None
    assert overhead_of(parse_gpu("h100-80gb"), None) is None
    assert overhead_of(parse_gpu("24GB"), None) is None  # a size is no card
    assert overhead_of(None, None) is None


def test_ranks_that_train_together_tell_nccls_share() -> None:
    archive.join(measurement(758 * MIB))
    archive.join(measurement(1500 * MIB, ranks=2))
    found = overhead_of(parse_gpu("h200"), None)
    assert found is not None
    assert found.nccl == (1500 - 758) * MIB


@pytest.mark.parametrize(
    "more",
    [
        {"job": {"pretend_ranks": 8}},
        {"outcome": "out_of_memory"},
        {"environment": {"device": None}},
    ],
)
def test_other_runs_teach_nothing(more: dict[str, Any]) -> None:
    archive.join(measurement(758 * MIB, **more))
    assert not (data_folder() / OVERHEADS).exists()


def test_a_broken_table_is_no_reason_to_fail() -> None:
    archive.join(measurement(758 * MIB))
    (data_folder() / OVERHEADS).write_text("[]")
    assert overhead_of(parse_gpu("h200"), None) is None
    (data_folder() / OVERHEADS).write_text(json.dumps({"cards": [{"device": "x"}, 3]}))
    assert overhead_of(parse_gpu("h200"), None) is None


def test_estimates_for_that_card_take_it_and_say_so() -> None:
    from vramplan.memory.estimate import estimate
    from vramplan.recipe.recipe import Recipe
    from vramplan.reports.assumptions import assumptions

    model, recipe = "meta-llama/Llama-3.2-1B", Recipe(seq_len=512)
    before = estimate(model, recipe, "h200")
    constant, required = before.overhead["context"], before.required
    archive.join(measurement(700 * MIB))
    after = estimate(model, recipe, "h200")
    assert after.overhead["context"] == 700 * MIB
    assert after.required == required - constant + 700 * MIB
    assert constant != 700 * MIB
    assert after.peak_allocated == before.peak_allocated  # nothing else is fitted
    assert any("700.0 MiB, measured here in 1 run" in line for line in assumptions(after))
    elsewhere = estimate(model, recipe, "h100-80gb")
    assert elsewhere.overhead == before.overhead
