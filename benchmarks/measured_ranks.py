"""Measured runs of one rank of several: DDP and DeepSpeed, pretended and real process groups."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vramplan.memory.estimate import Estimate, estimate
from vramplan.memory.timeline import Phase
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Quantization, Recipe

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "measured"
RANKED = ("ddp_gpu", "deepspeed_gpu")
QUANTIZED: dict[str, Quantization] = {"qlora": "nf4", "int8": "int8"}


@dataclass(frozen=True)
class RankRun:
    """One measured run, and what the estimate is compared with. Sizes are bytes."""

    id: str
    config: dict[str, Any]
    recipe: Recipe
    rank: int
    real: bool
    """Every rank on a GPU of its own; else the others are pretended."""
    peak_allocated: int
    phases: dict[str, Phase]
    """Ends and peaks of the last step; of load and prepare the ends, with their peak or 0."""
    overhead: int | None
    """NVML's figure of the process less what torch had reserved."""
    host_pinned: int | None

    def estimate(self) -> Estimate:
        """Of the rank that was measured."""
        return estimate(self.config, self.recipe, rank=self.rank)


def rank_runs(name: str) -> Iterator[RankRun]:
    """The runs of tests/measured/<name>.json."""
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for entry in document["runs"]:
        case = entry["case"]
        used, reserved = entry["process_used"], entry["reserved"]
        yield RankRun(
            id=case["id"],
            config=document["models"][case["model"]],
            recipe=_recipe(case),
            rank=case.get("rank", 0),
            real=entry["real"],
            peak_allocated=entry["peak_allocated"],
            phases=_phases(entry, made=bool(case.get("made"))),
            overhead=None if used is None else used - reserved,
            host_pinned=entry.get("host_pinned"),
        )


def _recipe(case: dict[str, Any]) -> Recipe:
    """The recipe of a case; what it leaves out has the harness's defaults."""
    method, lora = case.get("method", "full"), None
    if method != "full":
        lora = LoRA(rank=case["rank_lora"], dropout=case.get("dropout", 0.05))
    return Recipe(
        dtype=case.get("weights", "bf16"),
        mixed_precision=case.get("amp", "bf16"),
        quantization=QUANTIZED.get(method),
        lora=lora,
        gradient_checkpointing=bool(case.get("gc")),
        optimizer=case.get("optim", "adamw_torch_fused"),
        batch_size=case["batch"],
        seq_len=case["seq"],
        gradient_accumulation_steps=case.get("ga", 1),
        deepspeed=_zero(case.get("zero")),
        world_size=case["ranks"],
    )


def _zero(section: dict[str, Any] | None) -> DeepSpeed | None:
    """DeepSpeed's fields of a ds_config's zero_optimization."""
    if section is None:
        return None
    names = {field.name for field in fields(DeepSpeed)}
    values = {key: value for key, value in section.items() if key in names}
    for name, value in list(values.items()):
        if isinstance(value, dict):
            values[name], values["pin_memory"] = value["device"], value["pin_memory"]
    return DeepSpeed.from_dict(values)


def _phases(entry: dict[str, Any], *, made: bool) -> dict[str, Phase]:
    found: dict[str, Phase] = {"prepare": Phase(entry["initialized"]["end"], 0)}
    if not made:
        found["load"] = Phase(entry["load"]["end"], entry["load"]["peak"])
    peaks = {"forward": 0, "backward": 0}
    stepped = 0
    for mark in entry["last_step"]:
        name, end, peak = mark["phase"], mark["end"], mark.get("peak", 0)
        if name in peaks and not stepped:
            peaks[name] = max(peaks[name], peak)
            found[name] = Phase(end, peaks[name])
        elif name == "engine_step":
            stepped = peak
            peaks["backward"] = max(peaks["backward"], mark["backward_peak"])
            found["backward"] = Phase(mark["backward_end"], peaks["backward"])
        elif name == "backward":  # the loss is let go: what DeepSpeed's step ends with
            found["optimizer_step"] = Phase(end, stepped)
        elif name == "optimizer" and not stepped:
            found["optimizer_step"] = Phase(end, peak)
    return found
