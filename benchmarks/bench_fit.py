"""What planning costs: the default space for one model and card, cold and warm.

    python benchmarks/bench_fit.py [--rounds 5]

Cold: a fresh process, from the call of fit() on, with all that it compiles; the time to import
vramplan is told beside it. Warm: the same plan again in that process. Command: all of `vramplan
fit` in a fresh process, which also plans for the next larger card and for one more. Seconds are of
the processor (one thread), so that what else runs does not count. Goals: a cold plan for one card
within a second, and 5,000 candidates a second. Ratios are to importing click and rich in the same
process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

GOAL_SECONDS = 1.0
GOAL_RATE = 5_000
CASES = {
    "Llama-3.1-8B, RTX 4090": ("meta-llama/Llama-3.1-8B", "rtx-4090"),
    "Llama-3.1-8B, H100": ("meta-llama/Llama-3.1-8B", "h100-80gb"),
    "Llama-3.2-1B, 24 GB": ("meta-llama/Llama-3.2-1B", "24GB"),
    "Llama-3.1-70B, H100": ("meta-llama/Llama-3.1-70B", "h100-80gb"),
    "Qwen3-30B-A3B, H100": ("Qwen/Qwen3-30B-A3B", "h100-80gb"),
    "Gemma-2-9B, H100": ("google/gemma-2-9b", "h100-80gb"),
    "Gemma-3-1B, RTX 4090": ("google/gemma-3-1b-pt", "rtx-4090"),
    "Llama-3.1-8B, 4 x A100": ("meta-llama/Llama-3.1-8B", "4xa100-80gb"),
    "Llama-3.1-70B, 8 x H100": ("meta-llama/Llama-3.1-70B", "8xh100-80gb"),
}
ONE = """
import json, sys, time
start = time.process_time()
import click, rich.console, rich.table
baseline = time.process_time() - start
start = time.process_time()
from vramplan.planner.plan import fit
imported = time.process_time() - start
def timed():
    start = time.process_time()
    plan = fit(sys.argv[1], sys.argv[2])
    return time.process_time() - start, plan
cold, plan = timed()
warm, _ = timed()
print(json.dumps({"baseline": baseline, "imported": imported, "cold": cold, "warm": warm,
                  "candidates": len(plan.candidates), "evaluated": plan.evaluated,
                  "cards": plan.gpus.count}))
"""


def once(model: str, card: str) -> dict[str, Any]:
    """The figures of one fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", ONE, model, card], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "command": command(model, card)}


def command(model: str, card: str) -> float:
    """Seconds of the processor that the command takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = "from vramplan.cli.main import run; run()"
    arguments = [sys.executable, "-c", script, "fit", model, "--gpu", card]
    subprocess.run(arguments, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(rounds):  # in turn, so that a machine that slows down slows all of them
        for name, (model, card) in CASES.items():
            found[name].append(once(model, card))
    heads = ("candidates", "evaluated", "import", "cold", "ratio", "a second", "warm", "command")
    print(f"{'fit()':24}" + "".join(f"{head:>11}" for head in heads))
    for name, runs in found.items():
        print(f"{name:24}{line(runs)}")


def line(runs: list[dict[str, Any]]) -> str:
    """Medians of a case's runs."""

    def median(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    cold, count = median("cold"), runs[0]["candidates"]
    ratio = statistics.median(run["cold"] / run["baseline"] for run in runs)
    said = f"{count:>11,}{runs[0]['evaluated']:>11,}{median('imported'):>9.3f} s{cold:>9.3f} s"
    said += f"{ratio:>11.1f}{count / cold:>11,.0f}{median('warm'):>9.3f} s"
    said += f"{median('command'):>9.3f} s"
    if runs[0]["cards"] == 1 and cold > GOAL_SECONDS:
        said += f"  above {GOAL_SECONDS:g} s"
    return said + (f"  below {GOAL_RATE:,} a second" if count / cold < GOAL_RATE else "")


if __name__ == "__main__":
    main()
