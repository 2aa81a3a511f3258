"""The trace on fake CPU tensors against the trace on fake CUDA ones, cell by cell.

usage: python benchmarks/trace_cuda.py [--every N] [--part I/N] [--json FILE]

On CUDA tensors torch takes its own paths: which attention kernel, autocast's lists, what layer
norms keep, the engine's thread. On a CPU they are imitated by name. Needs a CUDA build of torch
and a GPU, of which it takes no memory but its context. Cells are those of trace_matrix.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from trace_matrix import cells, config_of, cut, recipe_of

Phases = list[list[Any]]


def phases(asked: dict[str, Any], device: str) -> Phases | str:
    """Name, start, end and peak of every phase; or what went wrong."""
    from vramplan_launcher.trace import trace

    config = cut(config_of(asked["model"]))
    try:
        result = trace(config, recipe_of(asked["fields"], config), device=device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    return [[p.name, p.start, p.end, p.peak] for p in result.phases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every N-th cell")
    parser.add_argument("--part", default="1/1", help="of these, the I-th of N shares")
    parser.add_argument("--json", type=Path, help="write what differs, and all phases, here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    part, parts = (int(n) for n in options.part.split("/"))
    chosen = cells()[:: options.every][part - 1 :: parts]
    found: dict[str, Any] = {}
    equal = 0
    for asked in chosen:
        cpu, cuda = phases(asked, "cpu"), phases(asked, "cuda")
        equal += cpu == cuda
        found[asked["id"]] = {"cpu": cpu, "cuda": cuda}
        if cpu != cuda:
            print(f"{asked['id']}: {difference(cpu, cuda)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found), encoding="utf-8")
    print(f"{equal} of {len(chosen)} cells are the same to the byte, in every phase")
    sys.exit(equal < len(chosen))


def difference(cpu: Phases | str, cuda: Phases | str) -> str:
    """The first phase that differs, or what one of them raised."""
    for side, name in ((cpu, "CPU"), (cuda, "CUDA")):
        if isinstance(side, str):
            return f"{name}: {side}"
    return next(f"CPU {one}, CUDA {two}" for one, two in zip(cpu, cuda, strict=True) if one != two)


if __name__ == "__main__":
    main()
