"""The plans that fit picks against real runs of the same jobs: writes docs/choice.md.

    python benchmarks/choice.py [--check]

tests/measured/choice.json holds the runs; its `what` says how they were made. Regret is what the
pick costs against the cheapest run that survived. --check prints, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vramplan import Goal, Recipe, estimate, fit
from vramplan.hardware.catalogue import find
from vramplan.hardware.gpu import Gpus
from vramplan.memory.estimate import resolve
from vramplan.planner.goal import METHOD_NAMES, method_of
from vramplan.planner.plan import Plan
from vramplan.timing.step import step_time
from vramplan.units import GIB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tests" / "measured" / "choice.json"
PAGE = ROOT / "docs" / "choice.md"
CAPS = (24, 48)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recipe, run for real."""

    model: str
    recipe: Recipe
    """As it was capped, with autocast."""
    timed: Recipe
    """As it was timed."""
    seconds: float
    """Median of the steps behind the first."""
    peak_allocated: int
    survived: dict[int, bool]
    """By cap in GiB; a cap that was not tried is missing."""

    @property
    def method(self) -> str:
        return method_of(self.recipe)

    @property
    def comparable(self) -> bool:
        """fp32 weights without autocast are another job: products in fp32."""
        return self.timed.dtype != "fp32" or self.timed.mixed_precision != "no"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A pick on a capped card, and the best that survived there."""

    model: str
    method: str
    cap: int
    plan: Plan
    pick: Run | None
    """None: the pick was not among the runs."""
    best: Run | None

    @property
    def regret(self) -> float | None:
        """Seconds of the pick over the best one's; None: not known, or it died."""
        if self.pick is None or self.best is None or not self.pick.survived.get(self.cap):
            return None
        return self.pick.seconds / self.best.seconds


def read() -> tuple[dict[str, Any], list[Run]]:
    """What the file says of itself, and its runs."""
    document = json.loads(RUNS.read_text(encoding="utf-8"))
    capped: dict[tuple[str, Recipe], dict[int, bool]] = {}
    for run in document["capped"]:
        tried = capped.setdefault((run["model"], Recipe.from_dict(run["recipe"])), {})
        tried[run["cap_gib"]] = run["ended"]
        if run["ended"]:  # what has room on a card has room on a larger one
            tried.update(dict.fromkeys((cap for cap in CAPS if cap > run["cap_gib"]), True))
    runs = []
    for run in document["timed"]:
        timed = Recipe.from_dict(run["recipe"])
        recipe = replace(timed, mixed_precision="bf16")
        runs.append(
            Run(
                model=run["model"],
                recipe=recipe,
                timed=timed,
                seconds=statistics.median(run["step_seconds"][1:]),
                peak_allocated=run["peak_allocated"],
                survived=capped.get((run["model"], recipe), {}),
            )
        )
    return document, runs


def card(document: dict[str, Any], cap: int) -> Gpus:
    """The card that ran them, with less memory."""
    gpu = find(document["card"])
    return Gpus(gpu=replace(gpu, memory=cap * GIB, usable=cap * GIB))


def choices(document: dict[str, Any], runs: list[Run]) -> Iterator[Choice]:
    """Of each model, method and cap."""
    for model, method in dict.fromkeys((run.model, run.method) for run in runs):
        mine = [run for run in runs if (run.model, run.method) == (model, method)]
        one = mine[0].recipe
        batch = one.batch_size * one.gradient_accumulation_steps
        goal = Goal(methods=(method,), seq_len=one.seq_len, effective_batch=batch, lora=one.lora)
        for cap in CAPS:
            plan = fit(model, card(document, cap), goal)
            pick = next((run for run in mine if run.recipe == plan.recipe), None)
            alive = [run for run in mine if run.survived.get(cap) and run.comparable]
            best = min(alive, key=lambda run: run.seconds, default=None)
            yield Choice(model=model, method=method, cap=cap, plan=plan, pick=pick, best=best)


def promised(document: dict[str, Any], runs: list[Run]) -> Iterator[tuple[Run, int, bool, bool]]:
    """(run, cap, whether it was said to fit, whether it survived) of all that was tried."""
    tried = {
        (run["model"], Recipe.from_dict(run["recipe"]), run["cap_gib"])
        for run in document["capped"]
    }
    for run in runs:
        for cap, survived in run.survived.items():
            if (run.model, run.recipe, cap) in tried:
                said = estimate(run.model, run.recipe, card(document, cap)).fits
                yield run, cap, bool(said), survived


def said(recipe: Recipe) -> str:
    """What differs among the runs, in words."""
    words = [f"micro-batch {recipe.batch_size}"]
    words.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.lora is None:
        words.append(f"{recipe.dtype} weights")
    if recipe.optimizer != "adamw_torch_fused":
        words.append(recipe.optimizer)
    return ", ".join(words)


def page(document: dict[str, Any], runs: list[Run]) -> str:
    """docs/choice.md."""
    made, kept = list(choices(document, runs)), list(promised(document, runs))
    broken = [(run, cap) for run, cap, fits, ok in kept if fits and not ok]
    claims = sum(fits for _, _, fits, _ in kept)
    shy = [(run, cap) for run, cap, fits, ok in kept if ok and not fits]
    known = [c.regret for c in made if c.regret is not None]
    env = document["environment"]
    libraries = ", ".join(f"{k} {env[k]}" for k in ("torch", "transformers", "peft", "accelerate"))
    lines = [
        "# The plans that fit picked, run for real\n",
        f"`benchmarks/choice.py` writes this page from tests/measured/choice.json: {len(runs)}",
        f"recipes of two jobs, on one {env['device']}",
        f"({libraries}).",
        "Weights are random, the models whole, 8 sequences make a step. Each recipe was timed by",
        "itself without a cap: the median of three optimizer steps behind the first. Each that",
        "could survive was run again in a process of its own, with torch's allocator capped to a",
        "card of 24 or 48 GiB less the CUDA context.\n",
        f"**{len(kept)} runs under a cap. {claims} were said to fit: of these {len(broken)} ran "
        "out of memory.**",
        f"Of the {len(kept) - claims} that were said not to fit, {len(shy)} survived: the "
        "allocator's slack is counted in full.",
        "",
        f"**Regret** (the pick's seconds over those of the quickest that survived): worst "
        f"{max(known):.3f} in the {len(known)} choices in which it is known.\n",
        "| model | method | card | pick | s | best that survived | s | regret |",
        "|---|---|---:|---|---:|---|---:|---:|",
        *(row(c) for c in made),
        "\n## What is wrong with it, and what is not known\n",
        *weaknesses(document, made, shy),
        "\n## Every run\n",
        "Predicted seconds are of the recipe as it was timed.\n",
        "| model | method | recipe | autocast | peak | s a step | predicted | 24 GiB | 48 GiB |",
        "|---|---|---|---|---:|---:|---:|---|---|",
        *(every(document, run) for run in runs),
        "",
    ]
    return "\n".join(lines)


def weaknesses(
    document: dict[str, Any], made: list[Choice], shy: list[tuple[Run, int]]
) -> Iterator[str]:
    """In sentences."""
    for c in made:
        where = f"{c.model}, {METHOD_NAMES[c.method]}, {c.cap} GiB"
        if c.pick is None and c.plan.recipe is not None:
            best = "" if c.best is None else f" The best that did: {said(c.best.recipe)}."
            yield f"- {where}: the pick ({said(c.plan.recipe)}) was not run.{best}"
        elif c.pick is not None and c.pick.survived.get(c.cap) is False:
            yield f"- {where}: the pick ran out of memory."
        elif c.regret is not None and c.regret > 1.05:
            yield f"- {where}: the pick took {c.regret:.2f} times as long as the best."
    for run, cap in shy:
        need = estimate(run.model, run.recipe, card(document, cap)).required - cap * GIB
        yield (
            f"- {run.model}, {METHOD_NAMES[run.method]}, {cap} GiB: {said(run.recipe)} was said to "
            f"lack {format_bytes(need)}, and survived."
        )
    yield (
        "- All timed runs but the first of a model, method and dtype ran without autocast, by a "
        "fault of the\n  measurement (see the file); the capped ones ran with it. That their order "
        "is the same with autocast\n  was not measured. Times of fp32 weights without autocast are "
        "those of another job, and left out of\n  regret."
    )
    yield (
        "- QLoRA, int8 and Gemma or a mixture of experts were planned for this measurement, and "
        "not run:\n  the time on the card was used up. Paged states lay on the card: their paging "
        "was not measured."
    )


def row(c: Choice) -> str:
    best = "none" if c.best is None else said(c.best.recipe)
    quick = "" if c.best is None else f"{c.best.seconds:.3f}"
    pick = "nothing fits" if c.plan.recipe is None else said(c.plan.recipe)
    measured = "not run" if c.pick is None else f"{c.pick.seconds:.3f}"
    regret = "not known" if c.regret is None else f"{c.regret:.3f}"
    cells = (c.model.split("/")[1], METHOD_NAMES[c.method], f"{c.cap} GiB", pick, measured)
    return f"| {' | '.join((*cells, best, quick, regret))} |"


def every(document: dict[str, Any], run: Run) -> str:
    seconds = step_time(resolve(run.model)[1], run.timed, card(document, 80)).seconds
    words = {True: "ended", False: "out of memory", None: "not tried"}
    cells = (
        run.model.split("/")[1],
        METHOD_NAMES[run.method],
        said(run.recipe),
        "yes" if run.timed.mixed_precision == "bf16" else "no",
        format_bytes(run.peak_allocated, digits=2),
        f"{run.seconds:.3f}",
        f"{seconds:.3f}",
        *(words[run.survived.get(cap)] for cap in CAPS),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    text = page(*read())
    if options.check:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
