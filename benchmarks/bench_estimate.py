"""What one estimate from a loaded config costs, as ratios within one run.

    python benchmarks/bench_estimate.py [--rounds 200]

Warm: an estimate of a model and a policy that were estimated before. First of its kind: the block's
description is recorded and compiled, in a process that has done so for other models. Rounds go
through all cases in turn, so that a machine that slows down slows all of them; the goal of a warm
estimate is 300 microseconds, whatever the layers, the batch and the sequence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from vramplan import Architecture, Recipe, estimate
from vramplan.memory import program, states, timeline
from vramplan.models import tensors
from vramplan.models.hf_config import architecture
from vramplan.models.locate import locate

MODEL = "meta-llama/Llama-3.1-8B"
GOAL = 300e-6


def cases() -> dict[str, tuple[Architecture, Recipe]]:
    """The baseline first."""
    arch = architecture(locate(MODEL).config)
    few, many = replace(arch, layers=2), replace(arch, layers=126)
    return {
        "2 layers, batch 1 x 512": (few, Recipe(batch_size=1, seq_len=512)),
        "126 layers, batch 1 x 512": (many, Recipe(batch_size=1, seq_len=512)),
        "2 layers, batch 64 x 512": (few, Recipe(batch_size=64, seq_len=512)),
        "2 layers, batch 1 x 131072": (few, Recipe(batch_size=1, seq_len=131_072)),
        "126 layers, batch 64 x 131072": (many, Recipe(batch_size=64, seq_len=131_072)),
    }


def forget() -> None:
    """Empties the caches that hold what was compiled."""
    for cached in (timeline.parts, program.compile_step, states.layout, tensors.inventory):
        cached.cache_clear()


def warm(arch: Architecture, recipe: Recipe) -> float:
    start = time.perf_counter()
    needed = estimate(arch, recipe)
    assert needed.required > 0
    return time.perf_counter() - start


def first(arch: Architecture, recipe: Recipe) -> float:
    forget()
    return warm(arch, recipe)


def measure(run: Callable[[Architecture, Recipe], float], rounds: int) -> dict[str, list[float]]:
    """Seconds by case, after one round that fills the caches."""
    chosen = cases()
    times: dict[str, list[float]] = {label: [] for label in chosen}
    for k in range(rounds + 1):
        for label, (arch, recipe) in chosen.items():
            taken = run(arch, recipe)
            if k:
                times[label].append(taken)
    return times


def show(title: str, times: dict[str, list[float]], goal: float | None = None) -> None:
    """Medians, and medians of the rounds' ratios to the first case."""
    print(f"{title:34} {'median':>11} {'ratio':>7}")
    baseline = next(iter(times.values()))
    for label, taken in times.items():
        ratio = statistics.median(one / base for one, base in zip(taken, baseline, strict=True))
        median = statistics.median(taken)
        note = "" if goal is None or median <= goal else f"  above {goal * 1e6:.0f} us"
        print(f"{label:34} {median * 1e6:8.0f} us {ratio:7.2f}{note}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    show("one estimate, warm", measure(warm, rounds), GOAL)
    show("one estimate, first of its kind", measure(first, max(1, rounds // 10)))


if __name__ == "__main__":
    main()
