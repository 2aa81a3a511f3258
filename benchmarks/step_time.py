"""Predicted against measured step times: the runs in tests/measured/step_time*.json.

    python benchmarks/step_time.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measured import FOLDER, recipe_of

from vramplan.hardware.catalogue import parse_gpu
from vramplan.models.hf_config import architecture
from vramplan.timing.step import StepTime, step_time


class Timed(NamedTuple):
    """A measured run and its prediction."""

    id: str
    model: str
    measured: float
    predicted: StepTime
    file: str

    @property
    def error(self) -> float:
        """Relative: above zero where the prediction is slower than the run."""
        return self.predicted.seconds / self.measured - 1


def timed(name: str) -> list[Timed]:
    """The runs of tests/measured/<name>.json."""
    models = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if isinstance(document, dict):
        models, document = {**models, **document["models"]}, document["runs"]
    return [_timed(entry, models, name) for entry in document]


def _timed(entry: dict[str, Any], models: dict[str, Any], name: str) -> Timed:
    case = entry["case"]
    arch = architecture(models[case["model"]])
    gpus = parse_gpu(entry.get("gpu", "h200"))
    predicted = step_time(arch, recipe_of(case), gpus)
    return Timed(case["id"], case["model"], entry["step_seconds_median"], predicted, name)


def kendall(pairs: list[tuple[float, float]]) -> float:
    """Kendall's tau-a."""
    score = total = 0
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            total += 1
            score += (a - c) * (b - d) > 0
            score -= (a - c) * (b - d) < 0
    return score / total if total else 1.0


def table(runs: list[Timed]) -> str:
    lines = ["| run | measured, ms | predicted, ms | error |", "| --- | ---: | ---: | ---: |"]
    for r in runs:
        ms = 1000 * r.predicted.seconds
        lines.append(f"| {r.id} | {1000 * r.measured:.1f} | {ms:.1f} | {100 * r.error:+.1f} % |")
    return "\n".join(lines)


def main() -> None:
    for path in sorted(FOLDER.glob("step_time*.json")):
        runs = timed(path.stem)
        print(f"\n## {path.name}\n\n{table(runs)}\n")
        errors = [abs(r.error) for r in runs]
        print(f"{len(runs)} runs, median error {100 * median(errors):.1f} %, "
              f"worst {100 * max(errors):.1f} %")
        for model in sorted({r.model for r in runs}):
            mine = [(r.predicted.seconds, r.measured) for r in runs if r.model == model]
            if len(mine) > 2:
                print(f"  {model}: {len(mine)} runs, Kendall {kendall(mine):.2f}")
        if "-v" in sys.argv:
            for r in runs:
                parts = {k: round(1000 * v, 1) for k, v in r.predicted.parts.items() if v}
                print(f"{r.id:34} {1000 * r.measured:7.1f} {parts}")


if __name__ == "__main__":
    main()
