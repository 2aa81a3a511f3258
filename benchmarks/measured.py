"""Measured runs as recipes: the anchors in tests/measured, read for `make accuracy` and the tests.

A case holds a run through transformers' Trainer, measured with torch's allocator counters at the
ends of the phases. `config` is the model's config.json; older files name one of `models.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vramplan.memory.estimate import Estimate, estimate
from vramplan.memory.timeline import Phase
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "measured"
PHASES = ("forward", "backward", "optimizer_step")


@dataclass(frozen=True)
class Run:
    """One measured run, and what the estimate is compared with: bytes by phase."""

    id: str
    file: str
    config: dict[str, Any]
    recipe: Recipe
    peak_allocated: int
    ends: dict[str, int]
    peaks: dict[str, int]
    case: dict[str, Any]

    def estimate(self) -> Estimate:
        """Of the first rank, as measured."""
        return estimate(self.config, self.recipe, rank=0)


def runs(name: str) -> Iterator[Run]:
    """The runs of tests/measured/<name>.json that ended."""
    models = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    for entry in json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")):
        if entry.get("ok", True):
            yield run_of(entry, models, name)


def run_of(entry: dict[str, Any], models: dict[str, Any] | None = None, name: str = "") -> Run:
    """A run of a file; `models`: the configs of cases that only name their model."""
    case = entry["case"]
    ends, peaks = _phases(entry["timeline"])
    return Run(
        id=case["id"],
        file=name,
        config=case.get("config") or (models or {})[case["model"]],
        recipe=recipe_of(case),
        peak_allocated=entry["peak_allocated"],
        ends={"load": entry["load"]["end"], "prepare": entry["prepared"]["end"], **ends},
        peaks={"load": entry["load"]["peak"], "prepare": entry["prepared"]["peak"], **peaks},
        case=case,
    )


def recipe_of(case: dict[str, Any]) -> Recipe:
    """The recipe of a case; what it leaves out has the harness's defaults."""
    method = case.get("method", "full")
    lora = None
    if method != "full":
        targets = case.get("targets", "all-linear")
        lora = LoRA(
            rank=case.get("rank", 8), dropout=case.get("dropout", 0.05), target_modules=targets
        )
    quantization = {"qlora": case.get("quant_type", "nf4"), "int8": "int8"}.get(method)
    return Recipe(
        dtype=case.get("weights", "bf16"),
        mixed_precision=case.get("amp", "bf16"),
        quantization=quantization,
        double_quant=case.get("double_quant", True),
        lora=lora,
        attention=case.get("attn", "sdpa"),
        gradient_checkpointing=bool(case.get("gc")),
        optimizer=case.get("optim", "adamw_torch_fused"),
        optim_target_modules=case.get("optim_target_modules", "all-linear"),
        optim_rank=case.get("optim_rank", 128),
        batch_size=case["batch"],
        seq_len=case["seq"],
        gradient_accumulation_steps=case.get("ga", 1),
        allocator="expandable_segments" if case.get("conf") else "default",
        deepspeed=_deepspeed(case.get("deepspeed")),
        world_size=case.get("pretend", 1) if case.get("deepspeed") else 1,
    )


def _deepspeed(config: dict[str, Any] | None) -> DeepSpeed | None:
    """The ZeRO settings of a ds_config, as far as they are DeepSpeed's fields."""
    if config is None:
        return None
    names = {f.name for f in fields(DeepSpeed)}
    values = {k: v for k, v in config["zero_optimization"].items() if k in names}
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = value["device"]
        elif isinstance(value, float):
            values[name] = int(value)
    return DeepSpeed.from_dict(values)


def _phases(timeline: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Ends and peaks of the last step, when optimizer states are there."""
    names = {"forward": "forward", "backward": "backward", "optimizer": "optimizer_step"}
    ends: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for mark in timeline:
        phase = names.get(mark["phase"])
        if phase:
            ends[phase] = mark["end"]
            peaks[phase] = mark["peak"]
    return ends, peaks


def phases_of(run: Run, e: Estimate) -> dict[str, Phase]:
    """The estimate's phases as the run's were measured.

    Under DeepSpeed accelerate's backward steps as well (utils/deepspeed.py,
    DeepSpeedEngineWrapper.backward), so that the harness sees both as backward.
    """
    phases = e.timeline.phases()
    if e.recipe.deepspeed is not None:
        step = phases["optimizer_step"]
        peak = max(phases["backward"].peak, step.peak)
        phases["backward"] = Phase(step.end, peak)
        phases["optimizer_step"] = Phase(step.end, step.end)
    return phases
