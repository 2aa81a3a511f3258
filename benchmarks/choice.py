"""What fit picks, against every sensible recipe run for real on a capped card: docs/choice.md.

    python benchmarks/choice.py [--check]

tests/measured/choice.json holds the runs; its `what` says how they were made. choice_jobs.py lists
what is to be run, real_runs.py runs it. --check prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from choice_jobs import CAPS, JOBS, Job, card

from vramplan import Recipe, estimate, fit
from vramplan.memory.estimate import resolve
from vramplan.planner.goal import METHOD_NAMES, method_of
from vramplan.timing.step import step_time
from vramplan.units import GIB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tests" / "measured" / "choice.json"
PAGE = ROOT / "docs" / "choice.md"
ALONE = "alone"
WARM = 2
"""Steps that are left out of a time; one, of a run of so few that nothing else would be left."""


@dataclass(frozen=True, kw_only=True)
class Capped:
    """One recipe, run for real on a capped card."""

    model: str
    recipe: Recipe
    cap: int
    """GiB."""
    ended: bool
    how: str
    """alone | 4 at a time | untimed"""
    seconds: float | None
    """Of a step, the median."""
    peak_allocated: int | None
    required: int
    """As it is predicted; so is `predicted_peak`."""
    predicted_peak: int
    predicted: float
    """Seconds."""

    @property
    def said_to_fit(self) -> bool:
        return self.required <= self.cap * GIB

    @property
    def method(self) -> str:
        return method_of(self.recipe)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A job on a card: what was picked of it, and what survived."""

    job: Job
    cap: int
    pick: Recipe
    picked: Capped | None
    """None: it was not run."""
    best: Capped | None
    """The quickest that survived."""

    @property
    def regret(self) -> float | None:
        """How many times as long as the best one the pick takes: one card, so what it costs."""
        if self.picked is None or self.best is None or not self.picked.ended:
            return None
        assert self.picked.seconds is not None
        assert self.best.seconds is not None
        return self.picked.seconds / self.best.seconds


def read() -> dict[str, Any]:
    """The file."""
    document: dict[str, Any] = json.loads(RUNS.read_text(encoding="utf-8"))
    return document


def capped(document: dict[str, Any]) -> list[Capped]:
    """The runs, each with what is predicted of it."""
    return [_capped(run, document["card"]) for run in document["runs"]]


def _capped(run: dict[str, Any], name: str) -> Capped:
    recipe, gpus = Recipe.from_dict(run["recipe"]), card(run["cap_gib"], name)
    needed = estimate(run["model"], recipe, gpus)
    times = run.get("step_seconds")
    warm = WARM if times and len(times) > 2 * WARM else 1
    return Capped(
        model=run["model"],
        recipe=recipe,
        cap=run["cap_gib"],
        ended=run["ended"],
        how=run["how"],
        seconds=statistics.median(times[warm:]) if times else None,
        peak_allocated=run.get("peak_allocated"),
        required=needed.required,
        predicted_peak=needed.peak_allocated,
        predicted=step_time(resolve(run["model"])[1], recipe, gpus).seconds,
    )


def choices(runs: Sequence[Capped], name: str) -> list[Choice]:
    """Each job on each card."""
    return [_choice(job, cap, runs, name) for job in JOBS for cap in CAPS]


def _choice(job: Job, cap: int, runs: Sequence[Capped], name: str) -> Choice:
    pick = fit(job.model, card(cap, name), job.goal).recipe
    assert pick is not None
    mine = best_timed([r for r in runs if of_job(r, job) and r.cap <= cap and r.seconds])
    survived = [r for r in mine if r.ended]
    return Choice(
        job=job,
        cap=cap,
        pick=pick,
        picked=next((r for r in mine if r.recipe == pick), None),
        best=min(survived, key=lambda r: r.seconds or 0.0, default=None),
    )


def of_job(run: Capped, job: Job) -> bool:
    return (run.model, run.method, run.recipe.seq_len) == (job.model, job.method, job.seq_len)


def best_timed(runs: Sequence[Capped]) -> list[Capped]:
    """One run a recipe: the one that was alone on its machine, where there is one."""
    found: dict[Recipe, Capped] = {}
    for run in sorted(runs, key=lambda r: r.how == ALONE):
        found[run.recipe] = run
    return list(found.values())


# --- the page -------------------------------------------------------------------------------


def said(recipe: Recipe) -> str:
    """What differs among the runs, in words."""
    words = [f"micro-batch {recipe.batch_size}"]
    words.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.lora is None:
        words.append(f"{recipe.dtype} weights")
    if recipe.optimizer != "adamw_torch_fused":
        words.append(recipe.optimizer)
    return ", ".join(words)


def page(document: dict[str, Any]) -> str:
    """docs/choice.md."""
    runs = capped(document)
    claims = [run for run in runs if run.said_to_fit]
    shy = [run for run in runs if run.ended and not run.said_to_fit]
    made = choices(runs, document["card"])
    known = [c for c in made if c.regret is not None]
    env = document["environment"]
    libraries = ", ".join(f"{k} {env[k]}" for k in ("torch", "transformers", "accelerate"))
    worst = max(c.regret or 0.0 for c in known)
    return "\n".join(
        [
            "# Plans against a capped card\n",
            "`benchmarks/choice.py` writes this page from tests/measured/choice.json: "
            f"{len(JOBS)} jobs, each",
            f"on a card of 24 and of 48 GiB. The card is an {env['device']} whose allocator was",
            f"capped ({libraries}); weights are",
            "random, the models whole, 8 sequences make a step. Every run had its own process.\n",
            f"**Memory: {len(runs)} runs. {len(claims)} were said to fit: of these "
            f"{sum(not run.ended for run in claims)} ran out of memory.**",
            f"Of the {len(runs) - len(claims)} that were said not to fit, {len(shy)} survived: "
            "the allocator's slack is counted in full.\n",
            f"**Choice: {len(known)} of {len(made)} picks were run, and none ran out of memory. "
            f"They cost at most {worst:.3f} x",
            "the best recipe that survived.**\n",
            "| model | method | card | pick | s a step | best that survived | s a step | cost |",
            "|---|---|---:|---|---:|---|---:|---:|",
            *map(_choice_row, made),
            *NOTES,
            "\n## The runs\n",
            "| model | method | recipe | card | required | said to fit | | s | predicted | |",
            "|---|---|---|---:|---:|---|---|---:|---:|---|",
            *(_row(run) for run in sorted(runs, key=_order)),
            "",
        ]
    )


NOTES = (
    "\n## How far this goes\n",
    "- What was run: every micro-batch, checkpointing and dtype that was said to fit or missed by",
    "  less than 3 %, with the fused AdamW and double quantization; of paged AdamW two. What was",
    "  not run differs from a run in a paged optimizer or in single quantization alone.",
    "- Of the picks' rivals the nearest were timed alone on their machine. The others ran on a",
    "  machine with four cards, all busy, where what waits for the host took up to twice as long:",
    "  their times are upper bounds; what is predicted of them is above the pick as well.",
    "- The step-time model was changed with these runs in view: the host's pace beside an H100,",
    "  and what checkpointing costs the host. As it was before, Gemma 3 on 24 GiB would have cost",
    "  1.38 x the best one; the other picks were within 1.04 x.",
    "- A run under a cap leaves the rest of the card to managed memory: nothing is paged there.",
    "  Offloading is no candidate while a plan stays on the card, and was not run under a cap.",
    "- No mixture of experts was run under a cap, and of int8 only micro-batches of one.",
)


def _order(run: Capped) -> tuple[Any, ...]:
    return run.model, run.method, run.cap, run.required, run.how


def _choice_row(choice: Choice) -> str:
    picked, best = choice.picked, choice.best
    regret = choice.regret
    cells = (
        choice.job.model.split("/")[1],
        METHOD_NAMES[choice.job.method],
        f"{choice.cap} GiB",
        said(choice.pick),
        "was not run" if picked is None else _seconds(picked),
        "" if best is None else "the pick" if best is picked else said(best.recipe),
        "" if best is None else _seconds(best),
        "" if regret is None else f"{regret:.3f} x",
    )
    return f"| {' | '.join(cells)} |"


def _seconds(run: Capped) -> str:
    return "" if run.seconds is None else f"{run.seconds:.3f}"


def _row(run: Capped) -> str:
    cells = (
        run.model.split("/")[1],
        METHOD_NAMES[run.method],
        said(run.recipe),
        f"{run.cap} GiB",
        format_bytes(run.required, digits=2),
        "yes" if run.said_to_fit else "no",
        "survived" if run.ended else "out of memory",
        _seconds(run),
        f"{run.predicted:.3f}" if run.seconds else "",
        run.how,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    text = page(read())
    if options.check:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
