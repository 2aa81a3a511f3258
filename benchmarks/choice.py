"""The plans that fit picks against real runs of all sensible recipes: writes docs/choice.md.

    python benchmarks/choice.py [--check]

tests/measured/choice.json holds the runs: median seconds of an optimizer step without a cap, and
whether the run survived with torch's allocator capped to a card of 24 and of 48 GiB (less the CUDA
context). Regret is what the pick costs against the cheapest run that survived. --check only prints.
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
from vramplan.planner.goal import METHOD_NAMES, method_of
from vramplan.planner.plan import Plan
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
    seconds: float
    """Median of the steps behind the first."""
    peak_allocated: int
    survived: dict[int, bool]
    """By cap in GiB."""

    @property
    def method(self) -> str:
        return method_of(self.recipe)


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
        """Cost of the pick as a share of the best one's; None: not known, or it died."""
        if self.pick is None or self.best is None or not self.pick.survived[self.cap]:
            return None
        return self.pick.seconds / self.best.seconds


def read() -> tuple[dict[str, Any], list[Run]]:
    """What the file says of itself, and its runs."""
    document = json.loads(RUNS.read_text(encoding="utf-8"))
    runs = [
        Run(
            model=run["model"],
            recipe=Recipe.from_dict(run["recipe"]),
            seconds=statistics.median(run["step_seconds"][1:]),
            peak_allocated=run["peak_allocated"],
            survived={int(cap): ended for cap, ended in run["survived"].items()},
        )
        for run in document["runs"]
    ]
    return document, runs


def card(cap: int) -> Gpus:
    """The card that ran them, with less memory."""
    return Gpus(gpu=replace(find("h200"), memory=cap * GIB, usable=cap * GIB))


def choices(runs: list[Run]) -> Iterator[Choice]:
    """Of each model, method and cap."""
    for model, method in dict.fromkeys((run.model, run.method) for run in runs):
        mine = [run for run in runs if (run.model, run.method) == (model, method)]
        one = mine[0].recipe
        batch = one.batch_size * one.gradient_accumulation_steps
        goal = Goal(methods=(method,), seq_len=one.seq_len, effective_batch=batch, lora=one.lora)
        for cap in CAPS:
            plan = fit(model, card(cap), goal)
            pick = next((run for run in mine if run.recipe == plan.recipe), None)
            alive = [run for run in mine if run.survived[cap]]
            best = min(alive, key=lambda run: run.seconds, default=None)
            yield Choice(model=model, method=method, cap=cap, plan=plan, pick=pick, best=best)


def promised(runs: list[Run]) -> Iterator[tuple[Run, int, bool, bool]]:
    """(run, cap, whether it was said to fit, whether it survived)."""
    for run in runs:
        for cap in CAPS:
            said = estimate(run.model, run.recipe, card(cap)).fits
            yield run, cap, bool(said), run.survived[cap]


def said(recipe: Recipe) -> str:
    """What differs among the runs, in words."""
    words = [f"micro-batch {recipe.batch_size}"]
    words.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.lora is None:
        words.append(f"{recipe.dtype} weights")
    if recipe.optimizer != "adamw_torch_fused":
        words.append(recipe.optimizer)
    if recipe.quantization == "nf4" and not recipe.double_quant:
        words.append("no double quant")
    return ", ".join(words)


def page(document: dict[str, Any], runs: list[Run]) -> str:
    """docs/choice.md."""
    made, kept = list(choices(runs)), list(promised(runs))
    broken = [
        f"{r.model}, {said(r.recipe)}, {cap} GiB" for r, cap, fits, ok in kept if fits and not ok
    ]
    shy = [(r, cap) for r, cap, fits, ok in kept if ok and not fits]
    known = [c.regret for c in made if c.regret is not None]
    env = document["environment"]
    libraries = ", ".join(f"{k} {env[k]}" for k in ("torch", "transformers", "peft", "accelerate"))
    wrong = [c for c in made if c.regret is None or c.regret > 1.05]
    claims = sum(fits for _, _, fits, _ in kept)
    verdict = f"**No plan that was said to fit ran out of memory: 0 of {claims}.**"
    if broken:
        verdict = f"**{len(broken)} of {claims} plans that were said to fit ran out of memory:** "
        verdict += f"{'; '.join(broken)}."
    late = sum(value > 1.05 for value in known)
    lines = [
        "# The plans that fit picked, run for real\n",
        f"`benchmarks/choice.py` writes this page from {len(runs)} recipes that were run on one",
        f"{env['device']} ({libraries}): every micro-batch, with and without checkpointing, in",
        "bf16 and where weights are trained in fp32. Weights are random, the models whole. Each",
        "was timed alone, without a cap: the median of three optimizer steps behind the first;",
        "then run again in a process of its own, three steps, with torch's allocator capped to a",
        "card of 24 GiB and of 48 GiB less the CUDA context.\n",
        verdict,
        f"{len(shy)} of {len(kept)} were said not to fit, and survived: the allocator's slack is",
        "counted in full.\n",
        "**Regret** (the pick's seconds a step over those of the quickest that survived): worst",
        f"{max(known):.3f}, mean {statistics.mean(known):.3f}, in {len(known)} choices; above 1.05",
        f"in {late}.\n",
        "| model | method | card | pick | predicted | measured | best that survived | s | regret |",
        "|---|---|---:|---|---:|---:|---|---:|---:|",
        *(row(c) for c in made),
        "\n## Those it got wrong\n",
        *([wrongly(c) for c in wrong] or ["None: every pick survived, within 1.05 of the best."]),
        "\n## Every run\n",
        "| model | method | recipe | peak | s a step | predicted | 24 GiB | 48 GiB |",
        "|---|---|---|---:|---:|---:|---|---|",
        *(every(run) for run in runs),
        "\nNot run: int8 LoRA (four times as slow), eager attention and AdamW's foreach variant "
        "(never\nbetter), offloading. Paged states lay on the card: their paging was not measured.",
        "",
    ]
    return "\n".join(lines)


def row(c: Choice) -> str:
    best = "none" if c.best is None else said(c.best.recipe)
    quick = "" if c.best is None else f"{c.best.seconds:.3f}"
    pick = "nothing fits" if c.plan.recipe is None else said(c.plan.recipe)
    predicted = "" if c.plan.pick is None else f"{c.plan.pick.seconds:.3f}"
    measured = "" if c.pick is None else f"{c.pick.seconds:.3f}"
    regret = "" if c.regret is None else f"{c.regret:.3f}"
    cells = (c.model.split("/")[1], METHOD_NAMES[c.method], f"{c.cap} GiB", pick, predicted)
    return f"| {' | '.join((*cells, measured, best, quick, regret))} |"


def wrongly(c: Choice) -> str:
    if c.pick is None:
        return (
            f"- {c.model}, {METHOD_NAMES[c.method]}, {c.cap} GiB: the pick was not among the runs."
        )
    if not c.pick.survived[c.cap]:
        return f"- {c.model}, {METHOD_NAMES[c.method]}, {c.cap} GiB: the pick ran out of memory."
    assert c.best is not None
    return (
        f"- {c.model}, {METHOD_NAMES[c.method]}, {c.cap} GiB: {said(c.pick.recipe)} took "
        f"{c.pick.seconds:.3f} s, {said(c.best.recipe)} only {c.best.seconds:.3f} s."
    )


def every(run: Run) -> str:
    from vramplan.memory.estimate import resolve
    from vramplan.timing.step import step_time

    seconds = step_time(resolve(run.model)[1], run.recipe, card(48)).seconds
    marks = ["ended" if run.survived[cap] else "out of memory" for cap in CAPS]
    return (
        f"| {run.model.split('/')[1]} | {METHOD_NAMES[run.method]} | {said(run.recipe)} "
        f"| {format_bytes(run.peak_allocated, digits=2)} | {run.seconds:.3f} | {seconds:.3f} "
        f"| {marks[0]} | {marks[1]} |"
    )


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
