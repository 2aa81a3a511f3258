"""What starting vramplan costs, as ratios to what its two libraries cost, all within one run.

    python benchmarks/bench_cli.py [--rounds 15] [--check]

Every command is a fresh process. Rounds go through all commands in turn, so that a machine that
slows down slows all of them; a command's figure is the median of its rounds' ratios to the baseline
of the same round. --check ends with 1 if a ratio is above its limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ESTIMATE = ("estimate", "meta-llama/Llama-3.1-8B", "--gpu", "24GB")


@dataclass(frozen=True, kw_only=True)
class Command:
    label: str
    arguments: tuple[str, ...]
    limit: float | None = None
    """The highest ratio to the baseline that is promised."""


def commands() -> tuple[Command, ...]:
    """The baseline first."""
    python = sys.executable
    beside = Path(python).with_name("vramplan")  # not resolved: a venv's python is a link
    installed = str(beside) if beside.exists() else shutil.which("vramplan")
    vramplan = (installed,) if installed else (python, "-m", "vramplan")
    return (
        Command(
            label="import click, rich (baseline)",
            arguments=(python, "-c", "import click, rich.table, rich.console"),
        ),
        Command(label="python -c pass", arguments=(python, "-c", "pass")),
        Command(label="import vramplan", arguments=(python, "-c", "import vramplan"), limit=0.5),
        Command(label="vramplan --help", arguments=(*vramplan, "--help"), limit=1.6),
        Command(label="vramplan estimate", arguments=(*vramplan, *ESTIMATE), limit=1.6),
        Command(
            label="vramplan estimate --json",
            arguments=(*vramplan, *ESTIMATE, "--json"),
            limit=1.6,
        ),
    )


def seconds(command: Command) -> float:
    """One cold run. 1 is an answer too: it does not fit."""
    # With compiled modules, as installed ones are: else every run would compile what it imports.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run(
        command.arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        env=environment,
    )
    taken = time.perf_counter() - start
    if done.returncode not in (0, 1) or done.stderr:
        raise SystemExit(f"{' '.join(command.arguments)}: {done.stderr.decode()}")
    return taken


def measure(chosen: tuple[Command, ...], rounds: int) -> list[list[float]]:
    """Seconds by command and round, after one round that fills the caches."""
    for command in chosen:
        seconds(command)
    by_round = [[seconds(command) for command in chosen] for _ in range(rounds)]
    return [list(times) for times in zip(*by_round, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()

    chosen = commands()
    times = measure(chosen, options.rounds)
    baseline = times[0]
    missed = []
    print(f"{'cold start':32} {'median':>9} {'ratio':>7} {'limit':>7}")
    for command, taken in zip(chosen, times, strict=True):
        ratio = statistics.median(one / base for one, base in zip(taken, baseline, strict=True))
        limit = f"{command.limit:7.2f}" if command.limit else " " * 7
        print(f"{command.label:32} {statistics.median(taken) * 1e3:6.1f} ms {ratio:7.2f} {limit}")
        if command.limit is not None and ratio > command.limit:
            missed.append(command.label)
    if missed:
        print(f"above the limit: {', '.join(missed)}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
