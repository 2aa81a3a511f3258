"""Traced against measured, phase by phase.

usage: trace_vs_measured.py NAME ... [--case PART ...] [--every N] [--verbose]

NAME is a file of tests/measured without its suffix: families_gpu, single_gpu. A line a case: the
peak's error and, where a phase's end or peak differs by more than 0.1 % of the case's peak, by
how many MiB (traced less measured). The phases are those of a step when optimizer states exist.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import Run, runs

MIB = 2**20
STEP = 2  # the first one that finds optimizer states
NOTABLE = 0.001  # of the peak


def capability_of(run: Run) -> str:
    """All runs recorded so far are of Hopper cards (H100, H200)."""
    return "9.0"


def traced(run: Run) -> tuple[int, dict[str, tuple[int, int]]]:
    """The peak of all steps, and (end, peak) of each phase."""
    from vramplan_launcher.trace.steps import trace

    recipe = run.recipe.to_dict()
    result = trace(run.config, recipe, steps=STEP, compute_capability=capability_of(run))
    loading, step = result.step(0), result.step(STEP)
    phases = {name: (step[name].end, step[name].peak) for name in run.ends if name in step}
    phases["load"] = loading["load"].end, loading["load"].peak
    phases["prepare"] = loading["prepare"].end, max(p.peak for p in loading.values())
    return result.peak_allocated, phases


def compare(run: Run, verbose: bool) -> float:
    """Prints one case's line, or table; returns the peak's error in percent."""
    began = time.time()
    peak, phases = traced(run)
    error = 100 * (peak / run.peak_allocated - 1)
    differences = []
    for name, found in phases.items():
        for what, value, measured in zip(
            ("end", "peak"), found, (run.ends[name], run.peaks[name]), strict=True
        ):
            if verbose:
                show(f"{name} {what}", value, measured)
            if abs(value - measured) > NOTABLE * run.peak_allocated:
                differences.append(f"{name} {what} {(value - measured) / MIB:+.1f}")
    if verbose:
        show("PEAK", peak, run.peak_allocated)
    seconds = time.time() - began
    print(f"{run.id:44} {error:+8.3f} %  {'; '.join(differences)}  ({seconds:.0f} s)", flush=True)
    return error


def show(what: str, found: int, measured: int) -> None:
    """One line: MiB, difference in bytes and percent."""
    difference = found - measured
    percent = 100 * difference / measured if measured else 0.0
    print(
        f"  {what:24} {found / MIB:12.2f} {measured / MIB:12.2f}"
        f" {difference:>14} {percent:+8.3f} %",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--case", action="append", help="only ids with this part")
    parser.add_argument("--every", type=int, default=1, help="only every N-th case")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen: list[Any] = [run for name in options.names for run in runs(name)][:: options.every]
    if options.case:
        chosen = [run for run in chosen if any(part in run.id for part in options.case)]
    errors = []
    for run in chosen:
        try:
            errors.append(compare(run, options.verbose))
        except Exception:
            print(f"{run.id}: {traceback.format_exc()[-1500:]}")
    if errors:
        mean = sum(map(abs, errors)) / len(errors)
        print(f"{len(errors)} cases: mean {mean:.3f} %, worst {max(errors, key=abs):+.3f} %")


if __name__ == "__main__":
    main()
