"""Traced against measured, phase by phase.

usage: trace_vs_measured.py MEASURED.json [--case ID ...] [--model NAME ...]
       --models FILE.py [--allocator default]

MEASURED.json is a list of runs as `tests/measured/README.md` describes them; their models'
figures are read from `--models FILE.py` (a dict `M` of Hugging Face configs).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

MIB = 2**20
PHASES = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer_step",
    "step_end": "step_end",
}


def recipe_of(case: dict[str, Any]) -> dict[str, Any]:
    """A measured case in the words of a recipe."""
    method = case.get("method", "full")
    lora = None
    if method != "full":
        lora = {
            "rank": case.get("rank", 8),
            "dropout": case.get("dropout", 0.05),
            "target_modules": case.get("targets", "all-linear"),
        }
    return {
        "dtype": case.get("weights", "bf16"),
        "mixed_precision": case.get("amp", "bf16"),
        "quantization": {"qlora": "nf4", "int8": "int8"}.get(method),
        "double_quant": case.get("double_quant", True),
        "lora": lora,
        "attention": case.get("attn", "sdpa"),
        "gradient_checkpointing": bool(case.get("gc")),
        "optimizer": case.get("optim", "adamw_torch_fused"),
        "batch_size": case["batch"],
        "seq_len": case["seq"],
        "gradient_accumulation_steps": case.get("ga", 1),
    }


def compare(run: dict[str, Any], configs: dict[str, Any], allocator: str) -> None:
    """Prints one case's table."""
    from vramplan_launcher.trace import trace

    case = run["case"]
    began = time.time()
    result = trace(configs[case["model"]], {**recipe_of(case), "allocator": allocator}, steps=3)
    print(f"== {case['id']}  ({time.time() - began:.0f} s)")
    show("load end", result.step(0)["load"].end, run["load"]["end"])
    show("load peak", result.step(0)["load"].peak, run["load"]["peak"])
    show("prepared end", result.step(0)["prepare"].end, run["prepared"]["end"])
    show("prepared peak", max(p.peak for p in result.step(0).values()), run["prepared"]["peak"])
    number = 1
    for entry in run["timeline"]:
        name = PHASES.get(entry["phase"])
        if name:
            traced = result.step(number)[name]
            if number > 1 or name == "forward":
                if "start" in entry:
                    show(f"{number} {name} start", traced.start, entry["start"])
                show(f"{number} {name} end", traced.end, entry["end"])
                if entry.get("peak"):
                    show(f"{number} {name} peak", traced.peak, entry["peak"])
        number += entry["phase"] == "step_end"
    show("PEAK", result.peak_allocated, run["peak_allocated"])


def show(what: str, traced: int, measured: int) -> None:
    """One line: MiB, difference in bytes and percent."""
    difference = traced - measured
    percent = 100 * difference / measured if measured else 0.0
    print(
        f"  {what:24} {traced / MIB:12.2f} {measured / MIB:12.2f}"
        f" {difference:>14} {percent:+8.3f} %",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("measured")
    parser.add_argument("--models", required=True)
    parser.add_argument("--case", action="append")
    parser.add_argument("--model", action="append")
    parser.add_argument("--allocator", default="expandable_segments")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    spec = importlib.util.spec_from_file_location("models", options.models)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for run in json.loads(Path(options.measured).read_text()):
        case = run["case"]
        if options.case and not any(c in case["id"] for c in options.case):
            continue
        if options.model and case["model"] not in options.model:
            continue
        try:
            compare(run, module.M, options.allocator)
        except Exception:
            print(f"== {case['id']}: {traceback.format_exc()[-1500:]}")


if __name__ == "__main__":
    main()
