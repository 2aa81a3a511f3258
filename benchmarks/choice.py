"""What fit picks, against every sensible recipe run for real on a capped card: docs/choice.md.

    python benchmarks/choice.py [--check]

tests/measured/choice.json holds the runs; its `what` says how they were made. choice_jobs.py lists
what is to be run, real_runs.py runs it. --check prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from choice_jobs import CAPS, CARDS, CONFIGS, JOBS, Job, card
from step_time import kendall

from vramplan import Recipe, estimate, fit
from vramplan.memory.estimate import resolve
from vramplan.planner.goal import METHOD_NAMES, method_of
from vramplan.timing.step import step_time
from vramplan.units import GIB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tests" / "measured" / "choice.json"
PAGE = ROOT / "docs" / "choice.md"
ALONE = "alone"
ENOUGH = 8
WARM = 2
"""Steps that are left out of a time; one, of a run of so few that nothing else would be left."""


@dataclass(frozen=True, kw_only=True)
class Capped:
    """One recipe, run for real on a capped card."""

    model: str
    recipe: Recipe
    gpu: str
    cap: int
    """GiB."""
    ended: bool
    how: str
    """alone | 2 at a time | 4 at a time | untimed"""
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
    gpu: str
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
    return [_capped(run) for run in document["runs"]]


def _capped(run: dict[str, Any]) -> Capped:
    recipe, gpus = Recipe.from_dict(run["recipe"]), card(run["cap_gib"], run["gpu"])
    source = CONFIGS.get(run["model"], run["model"])
    needed = estimate(source, recipe, gpus)
    times = run.get("step_seconds")
    warm = WARM if times and len(times) > 2 * WARM else 1
    return Capped(
        model=run["model"],
        recipe=recipe,
        gpu=run["gpu"],
        cap=run["cap_gib"],
        ended=run["ended"],
        how=run["how"],
        seconds=statistics.median(times[warm:]) if times else None,
        peak_allocated=run.get("peak_allocated"),
        required=needed.required,
        predicted_peak=needed.peak_allocated,
        predicted=step_time(resolve(source)[1], recipe, gpus).seconds,
    )


def choices(runs: Sequence[Capped]) -> list[Choice]:
    """Each job on each size of card, for every kind of card on which the pick was run."""
    return [choice for job in JOBS for cap in CAPS for choice in _choices(job, cap, runs)]


def _choices(job: Job, cap: int, runs: Sequence[Capped]) -> list[Choice]:
    made = [_choice(job, cap, runs, gpu) for gpu in CARDS]
    return [choice for choice in made if choice.picked is not None] or made[:1]


def _choice(job: Job, cap: int, runs: Sequence[Capped], gpu: str) -> Choice:
    pick = fit(job.source, card(cap, gpu), job.goal).recipe
    assert pick is not None
    mine = quickest(r for r in runs if of_job(r, job) and r.gpu == gpu and r.cap <= cap)
    survived = [r for r in mine if r.ended]
    return Choice(
        job=job,
        gpu=gpu,
        cap=cap,
        pick=pick,
        picked=next((r for r in mine if r.recipe == pick), None),
        best=min(survived, key=lambda r: r.seconds or 0.0, default=None),
    )


def of_job(run: Capped, job: Job) -> bool:
    return (run.model, run.method, run.recipe.seq_len) == (job.model, job.method, job.seq_len)


def quickest(runs: Iterable[Capped]) -> list[Capped]:
    """One timed run a recipe: the quickest, since what disturbs a run only slows it down."""
    found: dict[Recipe, Capped] = {}
    for run in runs:
        known = found.get(run.recipe)
        if run.seconds and (known is None or run.seconds < (known.seconds or 0.0)):
            found[run.recipe] = run
    return list(found.values())


def undisturbed(document: dict[str, Any], runs: Sequence[Capped]) -> list[tuple[Capped, float]]:
    """The runs that were alone on their machine, and the seconds predicted before they ran."""
    both = zip(runs, document["runs"], strict=True)
    return [
        (run, said["predicted_before"])
        for run, said in both
        if run.how == ALONE and run.seconds and "predicted_before" in said
    ]


def order(alone: Sequence[tuple[Capped, float]]) -> dict[str, float]:
    """Kendall's rank correlation of such runs, of each model of which a card ran ENOUGH."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run, said in alone:
        groups.setdefault((run.model, run.gpu), []).append((said, run.seconds or 0.0))
    return {m: kendall(pairs) for (m, _), pairs in groups.items() if len(pairs) >= ENOUGH}


# --- the page -------------------------------------------------------------------------------


def said(recipe: Recipe) -> str:
    """What differs among the runs, in words."""
    words = [f"micro-batch {recipe.batch_size}"]
    words.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.quantization in ("nf4", "fp4") and not recipe.double_quant:
        words.append("no double quantization")
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
    made = choices(runs)
    known = [c for c in made if c.regret is not None]
    env = document["environment"]
    libraries = ", ".join(f"{k} {env[k]}" for k in ("torch", "transformers", "accelerate"))
    worst = max(c.regret or 0.0 for c in known)
    alone = undisturbed(document, runs)
    ranks = ", ".join(f"{m.split('/')[-1]} {tau:.2f}" for m, tau in order(alone).items())
    best = sum(c.best is c.picked for c in known)
    off = [abs(said / (run.seconds or 1.0) - 1) for run, said in alone]
    return "\n".join(
        [
            "# Plans against a capped card\n",
            "`benchmarks/choice.py` writes this page from tests/measured/choice.json: "
            f"{len(JOBS)} jobs, each",
            "on a card of 24 and of 48 GiB. The card is an NVIDIA H100 (80 GB) or H200 whose",
            f"allocator was capped ({libraries});",
            "weights are random, the models whole, 8 sequences make a step. Every run had its own",
            "process.\n",
            f"**Memory: {len(runs)} runs. {len(claims)} were said to fit: of these "
            f"{sum(not run.ended for run in claims)} ran out of memory.**",
            f"Of the {len(runs) - len(claims)} that were said not to fit, {len(shy)} survived: "
            "the allocator's slack is counted in full.\n",
            f"**Choice: of {len(made)} picks {len(known)} were run, and none ran out of memory. "
            f"They cost at most {worst:.3f} x",
            f"the best recipe that survived, which was the pick itself in {best}.**\n",
            f"**Time: {len(alone)} of these runs were alone on their machine. What was predicted",
            f"before they ran is off by {100 * statistics.median(off):.1f} % in the median, and by "
            f"less than 15 % in {sum(x < 0.15 for x in off)}.**",
            f"Kendall's rank correlation, of models with {ENOUGH} such runs on one kind of card:",
            f"{ranks}.\n",
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
    "- What was run: every micro-batch, checkpointing, dtype, optimizer and (QLoRA) double",
    "  quantization that was said to fit, or missed by less than 3 %, on one kind of card or the",
    "  other. One is missing: Gemma 3, bf16, micro-batch 2, no checkpointing, with paged AdamW.",
    "- Kinds of card are not mixed in a row. A recipe that ran twice on one kind counts with its",
    "  quicker run: what disturbs a run only slows it down. Where four ran at a time, what waits",
    "  for the host took up to twice as long.",
    "- One QLoRA run without double quantization took 1.60 s alone and 1.21 s among four; the host",
    "  was slow then. Its 1.60 s would make the pick on 48 GiB cost 1.27 x. By themselves the",
    "  calls that double quantization adds take the host 53 to 76 µs a product. Before it ran,",
    "  both kinds were predicted alike: hence the 8B's rank correlation.",
    "- The step-time model was changed with these runs in view: the host's pace beside an H100,",
    "  what checkpointing costs the host, what double quantization costs it. As it was before the",
    "  first two, Gemma 3 on 24 GiB would have cost 1.38 x the best one; before the last, QLoRA on",
    "  48 GiB of an H200 would have cost 1.07 x.",
    "- A run under a cap leaves the rest of the card to managed memory: nothing is paged there.",
    "  Offloading is no candidate while a plan stays on the card, and was not run under a cap.",
)


def _order(run: Capped) -> tuple[Any, ...]:
    return run.model, run.method, run.cap, run.gpu, run.required, run.how


def _choice_row(choice: Choice) -> str:
    picked, best = choice.picked, choice.best
    regret = choice.regret
    cells = (
        choice.job.model.split("/")[-1],
        METHOD_NAMES[choice.job.method],
        _card(choice.gpu, choice.cap),
        said(choice.pick),
        "was not run" if picked is None else _seconds(picked),
        "" if best is None else "the pick" if best is picked else said(best.recipe),
        "" if best is None else _seconds(best),
        "" if regret is None else f"{regret:.3f} x",
    )
    return f"| {' | '.join(cells)} |"


def _card(gpu: str, cap: int) -> str:
    return f"{gpu.partition('-')[0].upper()}, {cap} GiB"


def _seconds(run: Capped) -> str:
    return "" if run.seconds is None else f"{run.seconds:.3f}"


def _row(run: Capped) -> str:
    cells = (
        run.model.split("/")[-1],
        METHOD_NAMES[run.method],
        said(run.recipe),
        _card(run.gpu, run.cap),
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
