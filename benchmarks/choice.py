"""Plans against real runs on a capped card: writes docs/choice.md.

    python benchmarks/choice.py [--check]

tests/measured/choice.json holds the runs; its `what` says how they were made. --check prints, and
writes nothing.
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
from vramplan.timing.step import step_time
from vramplan.units import GIB, format_bytes

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "tests" / "measured" / "choice.json"
PAGE = ROOT / "docs" / "choice.md"
CAPS = (24, 48)


@dataclass(frozen=True, kw_only=True)
class Capped:
    """One recipe, run for real on a capped card."""

    model: str
    recipe: Recipe
    cap: int
    """GiB."""
    ended: bool
    required: int
    """As it was predicted."""

    @property
    def said_to_fit(self) -> bool:
        return self.required <= self.cap * GIB


def read() -> dict[str, Any]:
    """The file."""
    document: dict[str, Any] = json.loads(RUNS.read_text(encoding="utf-8"))
    return document


def card(document: dict[str, Any], cap: int) -> Gpus:
    """The card that ran them, with less memory."""
    gpu = find(document["card"])
    return Gpus(gpu=replace(gpu, memory=cap * GIB, usable=cap * GIB))


def capped(document: dict[str, Any]) -> list[Capped]:
    """The capped runs, each with what was predicted of it."""
    found = []
    for run in document["capped"]:
        model, recipe, cap = run["model"], Recipe.from_dict(run["recipe"]), run["cap_gib"]
        needed = estimate(model, recipe, card(document, cap))
        found.append(
            Capped(
                model=model,
                recipe=recipe,
                cap=cap,
                ended=run["ended"],
                required=needed.required,
            )
        )
    return found


def said(recipe: Recipe) -> str:
    """What differs among the runs, in words."""
    words = [f"micro-batch {recipe.batch_size}"]
    words.append("checkpointing" if recipe.gradient_checkpointing else "no checkpointing")
    if recipe.lora is None:
        words.append(f"{recipe.dtype} weights")
    if recipe.optimizer != "adamw_torch_fused":
        words.append(recipe.optimizer)
    return ", ".join(words)


def picks(document: dict[str, Any], runs: list[Capped]) -> Iterator[tuple[str, str, int, str, str]]:
    """(model, method, cap, pick, how it fared) of each job that was run."""
    for model, method in dict.fromkeys((run.model, method_of(run.recipe)) for run in runs):
        mine = [run for run in runs if (run.model, method_of(run.recipe)) == (model, method)]
        one = mine[0].recipe
        batch = one.batch_size * one.gradient_accumulation_steps
        goal = Goal(methods=(method,), seq_len=one.seq_len, effective_batch=batch, lora=one.lora)
        for cap in CAPS:
            recipe = fit(model, card(document, cap), goal).recipe
            same = [run for run in mine if run.recipe == recipe and run.cap <= cap]
            fared = "was not run"
            if same:
                fared = "survived" if any(run.ended for run in same) else "ran out of memory"
            yield model, method, cap, "nothing" if recipe is None else said(recipe), fared


def page(document: dict[str, Any]) -> str:
    """docs/choice.md."""
    runs = capped(document)
    claims = [run for run in runs if run.said_to_fit]
    broken = [run for run in claims if not run.ended]
    shy = [run for run in runs if run.ended and not run.said_to_fit]
    env = document["environment"]
    libraries = ", ".join(f"{k} {env[k]}" for k in ("torch", "transformers", "peft", "accelerate"))
    lines = [
        "# Plans against a capped card\n",
        "`benchmarks/choice.py` writes this page from tests/measured/choice.json: runs of two",
        f"jobs, Llama-3.2-1B in full and Llama-3.1-8B by LoRA, on one {env['device']}",
        f"({libraries}).",
        "Weights are random, the models whole, 8 sequences make a step. Each ran three optimizer",
        "steps in a process of its own, with torch's allocator capped to a card of 24 or 48 GiB",
        "less the CUDA context.\n",
        f"**{len(runs)} runs. {len(claims)} were said to fit: of these {len(broken)} ran out of "
        "memory.**",
        f"Of the {len(runs) - len(claims)} that were said not to fit, {len(shy)} survived: the "
        "allocator's slack is counted in full.\n",
        "| model | method | recipe | card | required | said to fit | |",
        "|---|---|---|---:|---:|---|---|",
        *(row(run) for run in sorted(runs, key=lambda r: (r.model, r.cap, r.required))),
        "\n## What fit picks for these jobs\n",
        "| model | method | card | pick | |",
        "|---|---|---:|---|---|",
        *(
            f"| {model.split('/')[1]} | {METHOD_NAMES[method]} | {cap} GiB | {pick} | {fared} |"
            for model, method, cap, pick, fared in picks(document, runs)
        ),
        "\n## What was not measured\n",
        *NOT_MEASURED,
        f"\nThe {len(document['timed'])} runs whose times are valid, in seconds of an optimizer "
        "step:\n",
        "| model | method | recipe | measured | predicted |",
        "|---|---|---|---:|---:|",
        *(timed(document, run) for run in document["timed"]),
        "",
    ]
    return "\n".join(lines)


NOT_MEASURED = (
    "Regret, which is what a pick costs against the cheapest recipe that survives, is not known of",
    "any job. It takes the time of every recipe with autocast, and those times are missing:\n",
    "- 18 timed runs of these two jobs are invalid. Each model was loaded once and trained by one",
    "  Trainer after the other; accelerate does not wrap a model that it has prepared before, so",
    "  all but the first ran without autocast. choice.json lists them by name, without figures.",
    "- QLoRA of the 8B model, and Gemma 3 in full, were not run; nor was a mixture of experts.",
    "- Of paged optimizers one was run, and its states lay on the card: paging was not measured.",
    "- Offloading was not run.",
)


def row(run: Capped) -> str:
    cells = (
        run.model.split("/")[1],
        METHOD_NAMES[method_of(run.recipe)],
        said(run.recipe),
        f"{run.cap} GiB",
        format_bytes(run.required, digits=2),
        "yes" if run.said_to_fit else "no",
        "survived" if run.ended else "out of memory",
    )
    return f"| {' | '.join(cells)} |"


def timed(document: dict[str, Any], run: dict[str, Any]) -> str:
    """A row of the times: the median of the steps behind the first."""
    recipe = Recipe.from_dict(run["recipe"])
    predicted = step_time(resolve(run["model"])[1], recipe, card(document, 80)).seconds
    cells = (
        run["model"].split("/")[1],
        METHOD_NAMES[method_of(recipe)],
        said(recipe),
        f"{statistics.median(run['step_seconds'][1:]):.3f}",
        f"{predicted:.3f}",
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
