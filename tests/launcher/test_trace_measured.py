"""The trace against runs on a GPU of models that have no description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import trace

pytestmark = pytest.mark.filterwarnings("ignore")

RUNS = Path(__file__).parents[1] / "measured" / "traced_gpu.json"
LIMIT = 1e-4
"""Of the measured peak."""
NAMES = (
    "t5-base-4l-full-b8-s512",  # a trained attention bias
    "bart-base-lora16-b8-s512-gc",  # 16-bit logits
    "qwen2-vl-4l-lora16-b2-s1024-gc",  # text alone through a vision-language model
    "nemotron-4l-qlora16-b4-s1024",
)


def recipe_of(case: dict[str, Any]) -> dict[str, Any]:
    method = case.get("method", "full")
    lora = {"rank": case.get("rank"), "target_modules": case.get("targets", "all-linear")}
    return {
        "batch_size": case["batch"],
        "seq_len": case["seq"],
        "gradient_checkpointing": bool(case.get("gc")),
        "lora": None if method == "full" else lora,
        "quantization": "nf4" if method == "qlora" else None,
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_peak_is_the_measured_one(name: str) -> None:
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    runs = {run["case"]["id"]: run for run in json.loads(RUNS.read_text(encoding="utf-8"))}
    run = runs[name]
    result = trace(run["case"]["config"], recipe_of(run["case"]))
    assert result.peak_allocated == pytest.approx(run["peak_allocated"], rel=LIMIT)
    measured = [mark["end"] for mark in run["timeline"] if mark["phase"] == "forward"]
    assert result.step(2)["forward"].end == pytest.approx(measured[-1], rel=LIMIT)
