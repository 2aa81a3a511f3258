"""--launch of `vramplan sweep` and `vramplan ladder`: recipes run for real, one after the other, to
be shown beside what was predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vramplan.cli.asked import Asked
    from vramplan.planner.ladder import Ladder
    from vramplan.planner.sweep import Sweep
    from vramplan.recipe.recipe import Recipe

LAUNCH_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--launch", is_flag=True, help="Run each that fits, and show both."),
    click.option("--random-weights", is_flag=True, help="Of --launch: there is no checkpoint."),
)


class Measured(NamedTuple):
    """What a short run on random tokens showed."""

    peak: int | None = None
    """torch's, of the rank that had most."""
    seconds: float | None = None
    why: str = ""
    """Of a run that failed."""


def check_launch(launch: bool, random_weights: bool) -> None:
    """Raises UserError where there is no --launch, and an option of it."""
    from vramplan.errors import UserError

    if random_weights and not launch:
        raise UserError("--random-weights means nothing without --launch")


def measured_sweep(found: Sweep, asked: Asked, *, random_weights: bool = False) -> Sweep:
    """`found` with what its rows that fit measured. A row that is refused, or does not fit, is not
    run; one that fails keeps the reason, and the others go on."""
    rows = list(found.rows)
    runs = {
        number: (", ".join(f"{name} {value}" for name, value in row.values.items()), row.recipe)
        for number, row in enumerate(rows)
        if row.recipe is not None and row.fits is not False
    }
    real = run_each(list(runs.values()), asked, random_weights=random_weights)
    for number, one in zip(runs, real, strict=True):
        rows[number] = replace(
            rows[number], measured_peak=one.peak, measured_seconds=one.seconds, why=one.why
        )
    return replace(found, rows=tuple(rows))


def measured_ladder(found: Ladder, asked: Asked, *, random_weights: bool = False) -> Ladder:
    """`found` with what its rungs that fit measured."""
    rungs = list(found.rungs)
    runs = {n: (r.name, r.recipe) for n, r in enumerate(rungs) if r.fits is not False}
    real = run_each(list(runs.values()), asked, random_weights=random_weights)
    for number, one in zip(runs, real, strict=True):
        rungs[number] = replace(
            rungs[number], measured_peak=one.peak, measured_seconds=one.seconds, why=one.why
        )
    return replace(found, rungs=tuple(rungs))


def run_each(
    runs: Sequence[tuple[str, Recipe]], asked: Asked, *, random_weights: bool
) -> list[Measured]:
    """What each of `runs`, a name and a recipe, measured. Raises UserError, before the first of
    them starts, for what this machine lacks for one of them."""
    from vramplan_launcher.job import Job
    from vramplan_launcher.needs import check_cards, check_installed

    from vramplan.errors import UserError
    from vramplan.hardware.nvml import gpus_here

    here, reason = gpus_here()
    jobs = [
        Job(
            model=asked.model,
            recipe=recipe,
            gpu=asked.card,
            verify=True,
            random_weights=random_weights,
            trust_remote_code=asked.trust_remote_code,
        )
        for _, recipe in runs
    ]
    for job in jobs:
        check_installed(job)
        try:
            check_cards(job, sum(gpus.count for gpus in here), reason)
        except UserError:
            if here:
                raise
            raise UserError(f"{reason} --launch needs a GPU; without it all is predicted") from None
    found = []
    for number, ((name, _), job) in enumerate(zip(runs, jobs, strict=True), 1):
        click.echo(f"Run {number} of {len(jobs)}: {name}", err=True)
        found.append(_run(job))
    return found


def _run(job: object) -> Measured:
    from vramplan_launcher.job import Job
    from vramplan_launcher.run import folder_name, launch, new_folder

    from vramplan.cli.launching import RUNS

    assert isinstance(job, Job)
    folder = new_folder(RUNS / f"sweep-{folder_name(job, job.model)}", exactly=False)
    outcome = launch(job, folder)
    if outcome.outcome != "ended":
        return Measured(why=outcome.sentence or outcome.outcome.replace("_", " "))
    ranks = outcome.measurement["ranks"]
    peaks = [rank["peak_allocated"] for rank in ranks if rank.get("peak_allocated")]
    seconds = outcome.measurement["training"].get("step_seconds")
    return Measured(max(peaks, default=None), seconds)
