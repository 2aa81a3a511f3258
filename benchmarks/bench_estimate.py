"""What one estimate from a loaded config costs: warm, and the first of its kind.

    python benchmarks/bench_estimate.py [--rounds 200]

Warm: an estimate of a model and a policy that were estimated before, as a planner makes by the
thousand; the goal is 300 microseconds, whatever the layers, the batch and the sequence. Rounds go
through all cases in turn, so that a machine that slows down slows all of them.

First of its kind: the block's description is run and compiled, in a process that has done so for
other models. What that costs depends on the family and the regime, not on the layers, and comes
once: the second table has both figures for each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

from vramplan import Architecture, LoRA, Recipe, estimate
from vramplan.memory import program, states, timeline
from vramplan.models import tensors
from vramplan.models.hf_config import architecture
from vramplan.models.locate import locate

MODEL = "meta-llama/Llama-3.1-8B"
GOAL = 300e-6
KINDS = ("meta-llama/Llama-3.1-8B", "openai-community/gpt2", "deepseek-ai/DeepSeek-V3")
_BARE = LoRA(dropout=0.0)  # peft takes no dropout on experts
REGIMES = {
    "full": Recipe(seq_len=512),
    "full, checkpointing": Recipe(seq_len=512, gradient_checkpointing=True),
    "LoRA": Recipe(seq_len=512, lora=_BARE),
    "QLoRA, checkpointing": Recipe(
        seq_len=512, lora=_BARE, quantization="nf4", gradient_checkpointing=True
    ),
}


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


def warm(model: Architecture | dict[str, Any], recipe: Recipe) -> float:
    start = time.perf_counter()
    needed = estimate(model, recipe)
    assert needed.required > 0
    return time.perf_counter() - start


def first(model: Architecture | dict[str, Any], recipe: Recipe) -> float:
    forget()
    return warm(model, recipe)


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds by case, after one round that fills the caches."""
    chosen = cases()
    times: dict[str, list[float]] = {label: [] for label in chosen}
    for k in range(rounds + 1):
        for label, (arch, recipe) in chosen.items():
            taken = warm(arch, recipe)
            if k:
                times[label].append(taken)
    return times


def show(title: str, times: dict[str, list[float]]) -> None:
    """Medians, and medians of the rounds' ratios to the first case."""
    print(f"{title:34} {'median':>11} {'ratio':>7}")
    baseline = next(iter(times.values()))
    for label, taken in times.items():
        ratio = statistics.median(one / base for one, base in zip(taken, baseline, strict=True))
        median = statistics.median(taken)
        print(f"{label:34} {median * 1e6:8.0f} us {ratio:7.2f}{_note(median)}")
    print()


def kinds(rounds: int) -> None:
    """First and warm by family and regime, from the config as it was loaded."""
    print(f"{'from a loaded config':46} {'first':>10} {'warm':>10}")
    for name in KINDS:
        config = locate(name).config
        for regime, recipe in REGIMES.items():
            firsts = [first(config, recipe) for _ in range(max(3, rounds // 10))]
            warms = [warm(config, recipe) for _ in range(rounds)]
            once, again = statistics.median(firsts), statistics.median(warms)
            label = f"{name.rpartition('/')[2]}, {regime}"
            print(f"{label:46} {once * 1e3:7.2f} ms {again * 1e6:7.0f} us{_note(again)}")
    print()


def _note(median: float) -> str:
    return "" if median <= GOAL else f"  above {GOAL * 1e6:.0f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    show("one estimate, warm", measure(rounds))
    kinds(rounds)


if __name__ == "__main__":
    main()
