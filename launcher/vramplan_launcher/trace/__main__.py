"""`python -m vramplan_launcher.trace CONFIG.json RECIPE`: one trace, phase by phase."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter as Tally
from pathlib import Path
from typing import Any


def group(storages: list[Any], least: int = 0) -> list[tuple[int, int, str]]:
    """Storages of one kind summed: (bytes, how many, what), the largest first."""
    size: Tally[str] = Tally()
    count: Tally[str] = Tally()
    for s in storages:
        parts = ["*" if part.isdigit() else part for part in s.module.split(".")]
        kind = f"{s.category:10} {s.phase:12} {s.dtype:9} {list(s.shape)!s:26} {s.op}"
        kind += "  @" + ".".join(parts)
        size[kind] += s.size
        count[kind] += 1
    rows = [(size[k], count[k], k) for k in size if size[k] >= least]
    return sorted(rows, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vramplan_launcher.trace")
    parser.add_argument("config")
    parser.add_argument("recipe", nargs="?", default="{}")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--deep", action="store_true", help="trace few of many equal layers")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compute-capability", default="9.0")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of fake tensors")
    parser.add_argument("--verbose", action="store_true", help="storages at each peak and end")
    parser.add_argument("--least", type=int, default=0, help="hide kinds smaller than this")
    parser.add_argument("--phases", default="", help="comma-separated: only these in --verbose")
    parser.add_argument("--json")
    parser.add_argument("--events", help="write every allocation and release, in order, here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    from vramplan_launcher.trace import trace, trace_deep

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA build of torch, and a GPU")
    config = json.loads(Path(options.config).read_text())
    config = config.get("config", config)
    began = time.time()
    run = trace_deep if options.deep else trace
    result = run(
        config,
        json.loads(options.recipe),
        layers=options.layers,
        steps=options.steps,
        compute_capability=options.compute_capability,
        keep_events=bool(options.events),
        watch_peak=options.verbose or bool(options.json),
        device=options.device,
    )
    print(
        f"parameters {result.parameters}  trainable {result.trainable_parameters}  "
        f"peak {result.peak_allocated}  ({time.time() - began:.1f} s)"
    )
    for p in result.phases:
        print(f"{p.name:20} start {p.start:>14} end {p.end:>14} peak {p.peak:>14}")
    if options.verbose:
        wanted = options.phases.split(",") if options.phases else None
        for p in result.phases:
            if wanted and p.name not in wanted:
                continue
            for label, storages in (("peak", p.peak_storages), ("end", p.end_storages)):
                print(f"--- live at {label} of {p.name}")
                for nbytes, count, kind in group(storages, options.least):
                    print(f"{nbytes:>14} {count:>5} {kind}")
    if options.events:
        with open(options.events, "w") as out:
            for e in result.counter.events or []:
                s = e.storage
                what = f"{s.phase} {s.dtype} {list(s.shape)} {s.op} @{s.module}"
                out.write(f"{e.delta:+15d} {e.live:15d} {what}\n")
    if options.json:
        phases = [
            {
                "name": p.name,
                "start": p.start,
                "end": p.end,
                "peak": p.peak,
                "live_at_peak": group(p.peak_storages),
                "live_at_end": group(p.end_storages),
            }
            for p in result.phases
        ]
        document = {
            "parameters": result.parameters,
            "trainable_parameters": result.trainable_parameters,
            "peak_allocated": result.peak_allocated,
            "phases": phases,
        }
        Path(options.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
