"""`vramplan verify MODEL`: a short real run, only to see how the prediction holds."""

from __future__ import annotations

from typing import Any

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.launch_options import HOW


@command_about_a_run(
    "verify",
    click.option("--steps", metavar="N", type=int, help="Optimizer steps. [8]"),
    click.option(
        "--real-weights", is_flag=True, help="Load the checkpoint. [random weights, same memory]"
    ),
    *HOW,
    cards="what is in this machine",
)
def command(
    ctx: click.Context, asked: Asked, *, steps: int | None, real_weights: bool, **given: Any
) -> None:
    """Run a few steps of MODEL on random tokens, and compare with the prediction.

    Nothing is saved but the figures. Exit codes: as of `vramplan launch`.
    """
    from vramplan_launcher.job import Job, Training

    from vramplan.cli.launch import again, ranked, size_of
    from vramplan.cli.launch_options import way_of
    from vramplan.cli.launching import cards_for, start

    emulate, pretend = given.pop("emulate_gpu"), given.pop("pretend_ranks")
    job = Job(
        model=asked.model,
        recipe=ranked(asked, pretend),
        gpu=emulate or asked.card,
        training=Training(max_steps=steps),
        random_weights=not real_weights,
        emulate=size_of(emulate),
        pretend_ranks=pretend,
        verify=True,
        cpu=given.pop("cpu"),
        trust_remote_code=asked.trust_remote_code,
    )
    way = way_of(given, as_json=asked.as_json, again=again(asked, "verify"))
    gpus, here, reason = cards_for(job.gpu, cpu=job.cpu)
    ctx.exit(start(job, gpus, here, reason, way))
