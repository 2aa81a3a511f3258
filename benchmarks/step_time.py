"""Step times, predicted against measured: the runs in tests/measured/step_time*.json.

python benchmarks/step_time.py            # tables
python benchmarks/step_time.py --parts    # and where each prediction's time goes
python benchmarks/step_time.py --write    # writes the tables into docs/timing.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from measured import FOLDER, recipe_of

from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import resolve
from vramplan.models.hf_config import architecture
from vramplan.recipe.recipe import Recipe
from vramplan.timing.step import StepTime, step_time

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "timing.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
USES = (
    "given",
    "held out",
    "held out, 4 at a time",
    "ranks",
    "other card",
    "repeat",
    "calibration",
)
FEWEST = 5  # runs of one model in whose rank correlation something can be seen


class Timed(NamedTuple):
    """A measured run, and what is predicted of it."""

    id: str
    model: str
    use: str
    """A key of USES."""
    measured: float
    predicted: StepTime
    before: float | None
    """Seconds that were predicted before the run was made."""

    @property
    def error(self) -> float:
        """Above zero: predicted slower than it ran."""
        return self.predicted.seconds / self.measured - 1

    @property
    def error_before(self) -> float | None:
        """The same of what was predicted before the run."""
        return None if self.before is None else self.before / self.measured - 1


def timed() -> list[Timed]:
    """All runs."""
    return [run for path in sorted(FOLDER.glob("step_time*.json")) for run in _read(path)]


def _read(path: Path) -> Iterator[Timed]:
    models = json.loads((FOLDER / "models.json").read_text(encoding="utf-8"))
    document = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(document, dict):
        models, document = {**models, **document["models"]}, document["runs"]
    for entry in document:
        yield _timed(entry, models)


def _timed(entry: dict[str, Any], models: dict[str, Any]) -> Timed:
    case = entry.get("case", entry)
    name = case["model"]
    arch = architecture(models[name]) if name in models else resolve(name)[1]
    recipe = Recipe.from_dict(entry["recipe"]) if "recipe" in entry else recipe_of(case)
    predicted = step_time(arch, recipe, parse_gpu(entry.get("gpu", "h200")))
    return Timed(
        id=case["id"].removeprefix("time-"),
        model=name,
        use=entry.get("use", "given"),
        measured=entry["step_seconds_median"],
        predicted=predicted,
        before=entry.get("predicted_before"),
    )


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau: pairs in the same order, less those in the opposite one, of all."""
    score = total = 0
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            total += 1
            product = (a - c) * (b - d)
            score += (product > 0) - (product < 0)
    return score / total


def by_model(runs: Sequence[Timed]) -> dict[str, list[Timed]]:
    """The models with several runs, by card (repeats have the same prediction: left out)."""
    out: dict[str, list[Timed]] = {}
    for run in runs:
        if run.use in ("given", "held out"):
            out.setdefault(f"{run.model}, H200", []).append(run)
        elif run.use in ("held out, 4 at a time", "ranks"):
            out.setdefault(f"{run.model.rpartition('/')[2]}, H100", []).append(run)
    return {model: mine for model, mine in out.items() if len(mine) >= FEWEST}


def summary(name: str, errors: Sequence[float]) -> str:
    """One line of figures."""
    sizes = sorted(map(abs, errors))
    within = sum(size <= 0.15 for size in sizes)
    return (
        f"{name}: {len(sizes)} runs, median error {100 * median(sizes):.1f} %, "
        f"worst {100 * sizes[-1]:.1f} %, {within} within 15 %"
    )


def tables(runs: Sequence[Timed]) -> str:
    """Markdown: what is predicted of every run, and how far off that is."""
    lines = []
    for use in USES:
        mine = [run for run in runs if run.use == use]
        lines += ["", f"**{summary(use.capitalize(), [run.error for run in mine])}.**"]
        before = [run.error_before for run in mine if run.error_before is not None]
        if before:
            lines += ["", f"{summary('As predicted before the runs were made', before)}."]
        lines += ["", "| run | measured, ms | predicted, ms | error | before |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        lines += [_row(run) for run in mine]
    lines += ["", "Kendall's rank correlation among the runs of one model:", ""]
    for model, mine in by_model(runs).items():
        tau = kendall([(run.predicted.seconds, run.measured) for run in mine])
        lines.append(f"- {model}: {tau:.2f} ({len(mine)} runs)")
    return "\n".join(lines).strip()


def _row(run: Timed) -> str:
    before = "" if run.error_before is None else f"{100 * run.error_before:+.1f} %"
    predicted = 1000 * run.predicted.seconds
    error = f"{100 * run.error:+.1f} %"
    return f"| {run.id} | {1000 * run.measured:.1f} | {predicted:.1f} | {error} | {before} |"


def main() -> None:
    runs = timed()
    print(tables(runs))
    if "--parts" in sys.argv:
        for run in runs:
            parts = {k: round(1000 * v, 1) for k, v in run.predicted.parts.items() if v}
            print(f"{run.id:44} {1000 * run.measured:7.1f} ms {parts}")
    if "--write" in sys.argv:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{tables(runs)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
