"""`vramplan sweep --launch`: each row run for real, one after the other, measured beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vramplan.cli.asked import Asked
    from vramplan.planner.sweep import Row, Sweep


def measured(found: Sweep, asked: Asked, *, random_weights: bool = False) -> Sweep:
    """`found` with what short runs on random tokens measured. A row that is refused, or does not
    fit, is not run; one that fails keeps the reason, and the others go on."""
    from vramplan_launcher.job import Job
    from vramplan_launcher.needs import check_cards, check_installed

    from vramplan.hardware.nvml import gpus_here

    here, reason = gpus_here()
    rows = []
    for number, row in enumerate(found.rows, 1):
        if row.recipe is None or row.fits is False:
            rows.append(row)
            continue
        job = Job(
            model=asked.model,
            recipe=row.recipe,
            gpu=asked.card,
            verify=True,
            random_weights=random_weights,
            trust_remote_code=asked.trust_remote_code,
        )
        check_installed(job)
        check_cards(job, sum(gpus.count for gpus in here), reason)
        said = ", ".join(f"{name} {value}" for name, value in row.values.items())
        click.echo(f"Run {number} of {len(found.rows)}: {said}", err=True)
        rows.append(_run(row, job))
    return replace(found, rows=tuple(rows))


def _run(row: Row, job: object) -> Row:
    from vramplan_launcher.job import Job
    from vramplan_launcher.run import folder_name, launch, new_folder

    from vramplan.cli.launching import RUNS

    assert isinstance(job, Job)
    folder = new_folder(RUNS / f"sweep-{folder_name(job, job.model)}", exactly=False)
    outcome = launch(job, folder)
    if outcome.outcome != "ended":
        return replace(row, why=outcome.sentence or outcome.outcome.replace("_", " "))
    ranks = outcome.measurement["ranks"]
    peaks = [rank["peak_allocated"] for rank in ranks if rank.get("peak_allocated")]
    return replace(
        row,
        measured_peak=max(peaks, default=None),
        measured_seconds=outcome.measurement["training"].get("step_seconds"),
    )
