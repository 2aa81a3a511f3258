"""`vramplan fit MODEL --launch`: the plan's run, started as `vramplan launch` starts one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan_launcher.job import Job

    from vramplan.planner.goal import Goal
    from vramplan.planner.plan import Plan

LAUNCH_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--launch", is_flag=True, help="Run the plan, then show how it held."),
    click.option("--cpu", is_flag=True, help="Of --launch: a tiny model on the processor instead."),
    click.option("--data", metavar="FILE|ID", help="Of --launch. [a few steps, random tokens]"),
    click.option("--max-steps", metavar="N", type=int, help="Of --launch: optimizer steps."),
    click.option("--output", metavar="FOLDER", help="Of --launch: the run's. [runs/...]"),
    click.option("--emulate-gpu", metavar="SIZE", help="Of --launch: act as a smaller card."),
    click.option("--fallback", metavar="N", type=int, help="Of --launch: try N smaller plans. [0]"),
    click.option("--random-weights", is_flag=True, help="Of --launch: there is no checkpoint."),
)
_OPTIONS = ("cpu", "data", "max_steps", "output", "emulate_gpu", "fallback", "random_weights")
PLAN = "plan.json"
TINY = Path(__file__).parents[1] / "planner" / "tiny"
"""A Llama of half a million parameters."""
TINY_CARD = "24GB"
"""What the tiny model is planned for; any card has room for it."""
TINY_TOKENS = 128
"""A sequence: seconds on any processor."""


def take(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch, taken out of `given`. Raises UserError where there is no --launch
    and one of them."""
    from vramplan.errors import UserError

    mine = {name: given.pop(name) for name in _OPTIONS}
    idle = [name for name, value in mine.items() if value not in (None, False)]
    if not given["launch"] and idle:
        raise UserError(f"--{idle[0].replace('_', '-')} means nothing without --launch")
    return mine


def check_card(asked_card: str | None, *, cpu: bool) -> None:
    """Raises UserError where there is no GPU to launch on, before anything is planned."""
    from vramplan.errors import UserError
    from vramplan.hardware.nvml import gpus_here

    found, reason = gpus_here()
    if found or cpu:
        return
    alone = "" if asked_card is None else " The plan alone needs none: leave out --launch."
    raise UserError(
        f"{reason} --launch needs a GPU.{alone} With --cpu a tiny model is planned and run on the "
        "processor, so that you see the whole loop"
    )


def tiny_plan(goal: Goal) -> Plan:
    """A plan for the tiny model, by the methods of the goal that the processor can run."""
    from vramplan.planner.plan import fit

    methods = tuple(m for m in goal.methods or ("lora",) if m in ("full", "lora")) or ("lora",)
    # Without DeepSpeed: its kernels for the processor take minutes to build.
    small = replace(
        goal, methods=methods, seq_len=TINY_TOKENS, effective_batch=4, pins={"zero": None}
    )
    plan = fit(str(TINY), TINY_CARD, small)
    return replace(plan, id="tiny-llama")


def launched(plan: Plan, model: str, card: str | None, options: dict[str, Any]) -> int:
    """Runs the pick in a new folder, with the plan beside it. Returns the exit code."""
    from vramplan.cli.launch_options import DATA, HOW, MACHINES, TRAINING, names_of, way_of
    from vramplan.cli.launching import cards_for, start

    assert plan.pick is not None
    given: dict[str, Any] = dict.fromkeys(names_of((*DATA, *TRAINING, *HOW, *MACHINES)))
    given |= {name: options[name] for name in _OPTIONS if name != "random_weights"}
    given |= dict.fromkeys(("anyway", "verbose", "no_archive", "padding_mask", "slurm"), False)
    job = _job(plan, model, card, given, random=options["random_weights"])
    for name in ("cpu", "emulate_gpu", "pretend_ranks"):
        given.pop(name)
    way = replace(
        way_of(given),
        output=_free(options["output"], job, plan.id),
        fallbacks=tuple(candidate.recipe for candidate in plan.fallbacks),
    )
    assert way.output is not None
    gpus, here, reason = cards_for(job.gpu, cpu=job.cpu)
    if plan.gpus.indices:  # of this machine: what was planned for, free memory and all
        gpus = plan.gpus
        os.environ.update(visible(plan))
    new = not way.output.exists()
    try:
        return start(job, gpus, here, reason, way)
    finally:  # the folder is made when the run is started, and kept however it ends
        if new and way.output.is_dir():
            plan.save(way.output / PLAN)


def visible(plan: Plan) -> dict[str, str]:
    """What shows a run the cards that its plan uses, and no others."""
    assert plan.pick is not None
    chosen = plan.gpus.indices[: plan.pick.cards]
    if len(set(chosen)) < len(chosen):
        return {}  # instances of one card (MIG) have no numbers of their own
    numbers = ",".join(map(str, chosen))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers}


def _free(output: str | None, job: Job, model: str) -> Path:
    """The folder that was named, or the next free one under `runs/`."""
    from vramplan_launcher.run import folder_name

    from vramplan.cli.launching import RUNS

    if output is not None:
        return Path(output)
    wanted = RUNS / folder_name(job, model)
    names = (wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10_000))
    return next(path for path in (wanted, *names) if not path.exists())


def _job(plan: Plan, model: str, card: str | None, given: dict[str, Any], *, random: bool) -> Job:
    from vramplan_launcher.job import Job

    from vramplan.cli.launch import data_given, size_of
    from vramplan.cli.launch_options import training_of

    assert plan.recipe is not None
    data, emulate = data_given(given), given["emulate_gpu"]
    return Job(
        model=model,
        recipe=plan.recipe,
        gpu=emulate or (card if given["cpu"] else None),  # else the cards here are what counts
        data=data,
        training=training_of(given),
        random_weights=random,
        emulate=size_of(emulate),
        verify=data is None,
        cpu=bool(given["cpu"]),
    )
