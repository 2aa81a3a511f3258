"""From what was asked to a run and its report: what `launch`, `verify` and `fit` share.

Everything here reaches for the launcher, and is imported by commands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vramplan_launcher.job import Job
    from vramplan_launcher.run import Launch, Outcome

    from vramplan.hardware.gpu import Gpus
    from vramplan.memory.estimate import Estimate
    from vramplan.recipe.recipe import Recipe

RUNS = Path("runs")
"""Where run folders are made, in the folder where one stands."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a job is to be run, beside what it is."""

    output: Path | None = None
    """The run's folder; None: a new one under `runs/`."""
    anyway: bool = False
    """Run what won't fit."""
    fallback: int = 0
    """After a run out of memory, so many smaller plans are tried."""
    allow_8bit: bool = False
    launcher: Any = "auto"
    """auto, python, torchrun or deepspeed."""
    nodes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Nodes`; empty is this machine alone."""
    slurm: bool = False
    slurm_options: Sequence[str] = ()
    """Further options of sbatch: "partition=gpu"."""
    verbose: bool = False
    archive: bool = True
    as_json: bool = False
    again: tuple[str, ...] = ("vramplan", "launch")
    """The command line without a recipe, for what is offered in place of what does not fit."""
    fallbacks: Sequence[Recipe] = ()
    """Smaller plans of a planner's; without any, `smaller` finds some."""


def cards_for(card: str | None, *, cpu: bool = False) -> tuple[Gpus | None, int, str]:
    """The cards that a prediction is for, how many are here, and why none are."""
    from vramplan.hardware.catalogue import parse_gpu
    from vramplan.hardware.nvml import gpus_here

    found, reason = ([], "") if cpu else gpus_here()
    here = sum(gpus.count for gpus in found)
    if card is not None:
        return parse_gpu(card), here, reason
    return max(found, key=lambda gpus: gpus.free or 0, default=None), here, reason


def predict(job: Job, gpus: Gpus | None) -> Estimate | None:
    """The estimate of a job; None, said on stderr, for a model that has no rules."""
    from vramplan.memory.estimate import estimate
    from vramplan.models.hf_config import UnknownArchitecture

    try:
        return estimate(job.model, job.recipe, gpus, rank=0 if job.pretend_ranks else None)
    except UnknownArchitecture as error:
        click.echo(f"No prediction: {error}", err=True)
        return None


def start(job: Job, gpus: Gpus | None, here: int, reason: str, way: Way) -> int:
    """Runs the job, and its smaller plans if need be; prints the report. Returns the exit code."""
    from vramplan_launcher.hosts import check_hosts
    from vramplan_launcher.needs import check_cards, check_installed
    from vramplan_launcher.run import ranks_command

    check_installed(job)
    if way.slurm:
        return _slurm(job, gpus, way)
    how = _how(way)
    ranks_command(job, how)  # what nothing can start is refused before anything is made
    if not how.hosts:
        check_cards(job, here, reason, machines=way.nodes.get("count", 1))
    needed = predict(job, gpus)
    if needed is not None and needed.fits is False and not way.anyway:
        return _refused(needed, way)
    if how.hosts:
        check_hosts(how.hosts)
    outcome = _once(job, needed, way, how)
    tried = 0
    while outcome.outcome == "out_of_memory":
        rungs = _smaller(needed, way, tried)
        if tried >= way.fallback or not rungs:
            _offer(job, rungs)
            break
        needed = rungs[0]
        job = replace(job, recipe=needed.recipe)
        tried += 1
        click.echo(f"Trying a smaller plan ({tried} of {way.fallback}): {_flags(job)}", err=True)
        outcome = _once(job, needed, _next(way, tried), how)
    return outcome.code


def _next(way: Way, tried: int) -> Way:
    """The same for a smaller plan: beside the folder that was named."""
    wanted = way.output
    if wanted is None:
        return way
    return replace(way, output=wanted.with_name(f"{wanted.name}-smaller-{tried}"))


def _once(job: Job, needed: Estimate | None, way: Way, how: Launch) -> Outcome:
    from vramplan_launcher import archive
    from vramplan_launcher.run import launch

    from vramplan.cli.progress import Screen
    from vramplan.reports.run import compare, render

    said = None if needed is None else _predicted(job, needed)
    folder = _folder(job, needed, way)
    beside = {"fallbacks": _fallbacks(way)}
    screen = Screen(None if needed is None or job.cpu else needed.peak_allocated)
    screen.say(f"Run folder: {folder}")
    outcome = launch(job, folder, prediction=said, how=how, hear=screen.hear, beside=beside)
    screen.clear()
    if way.archive and outcome.reporting and not archive.private() and outcome.outcome != "refused":
        archive.join(outcome.measurement)
    if way.as_json:
        import json

        click.echo(json.dumps(outcome.measurement, indent=2))
    elif outcome.reporting:
        click.echo(render(compare(outcome.measurement)))
    else:
        click.echo(f"{folder.name}: {outcome.outcome}. The first rank's machine has the report.")
    _last_words(outcome, job)
    return outcome


def _last_words(outcome: Outcome, job: Job) -> None:
    folder = outcome.folder
    saved = outcome.measurement["training"].get("saved")
    if saved:
        click.echo(f"Saved: {saved}", err=True)
    if outcome.sentence:
        click.echo(f"Error: {outcome.sentence}", err=True)
    if outcome.outcome == "out_of_memory":
        click.echo(f"The log: {folder / 'log.txt'}", err=True)
    if outcome.outcome in ("interrupted", "failed") and job.trains:
        from vramplan_launcher.run import complete_checkpoints

        kept = complete_checkpoints(folder)
        if kept:
            click.echo(f"To go on from {kept[-1].name}: {_resume(folder)}", err=True)
        else:
            click.echo("There is no checkpoint to go on from.", err=True)


def _resume(folder: Path) -> str:
    from vramplan.cli.terminal import command_line

    return command_line(("vramplan", "launch", str(folder), "--resume"), 200)


def _predicted(job: Job, needed: Estimate) -> dict[str, Any]:
    from vramplan.errors import UserError
    from vramplan.reports.run import predicted
    from vramplan.timing.step import step_time

    said = predicted(needed)
    gpus = needed.gpu
    if gpus is not None and not gpus.nominal and not job.pretend_ranks and not job.cpu:
        from contextlib import suppress

        with suppress(UserError):  # a card of unknown rates
            step = step_time(needed.architecture, job.recipe, gpus)
            said["time"] = {"seconds": step.seconds, "tokens": step.tokens}
    return said


def _folder(job: Job, needed: Estimate | None, way: Way) -> Path:
    from vramplan_launcher.run import folder_name, new_folder, shared_folder

    from vramplan.errors import UserError

    wanted = way.output
    if way.nodes.get("rendezvous"):
        if wanted is None:
            raise UserError("--rendezvous without --output: name one folder, the same on each")
        return shared_folder(wanted)
    name = job.model.rstrip("/") if needed is None else needed.id
    return new_folder(wanted or RUNS / folder_name(job, name), exactly=wanted is not None)


def _how(way: Way) -> Launch:
    from vramplan_launcher.command import Nodes
    from vramplan_launcher.run import Launch

    nodes = Nodes(**way.nodes) if way.nodes else None
    return Launch(launcher=way.launcher, nodes=nodes, echo=way.verbose)


# --- what does not fit ----------------------------------------------------------------------


def _refused(needed: Estimate, way: Way) -> int:
    """What `vramplan estimate` says of it, and that it was not started."""
    from vramplan.cli.shown import shown_json, shown_text
    from vramplan.memory.advice import advise, combine

    if way.as_json:
        click.echo(shown_json(needed))
    else:
        mix = combine(needed)
        changes = advise(needed)
        click.echo(shown_text(needed, "", changes=changes, combination=mix, again=way.again))
    click.echo("It was not started: it does not fit. --anyway starts it all the same.", err=True)
    return 1


def _smaller(needed: Estimate | None, way: Way, tried: int) -> list[Estimate]:
    """The plans that come next, the first of them first."""
    if needed is None:
        return []
    from vramplan_launcher.smaller import smaller

    from vramplan.memory.estimate import estimate

    if way.fallbacks:
        rest = way.fallbacks[tried : tried + 1]
        return [estimate(needed.architecture, recipe, needed.gpu) for recipe in rest]
    return smaller(needed, 1, allow_8bit=way.allow_8bit)


def _offer(job: Job, rungs: Sequence[Estimate]) -> None:
    from vramplan.units import format_bytes

    if not rungs:
        click.echo("No smaller plan teaches the same: see `vramplan estimate --advice`.", err=True)
        return
    then = rungs[0]
    click.echo(
        f"The next smaller plan needs {format_bytes(then.required)}: "
        f"{_flags(replace(job, recipe=then.recipe), job.recipe)} (--fallback 1 tries it by itself)",
        err=True,
    )


def _flags(job: Job, base: Recipe | None = None) -> str:
    from vramplan.memory.advice import recipe_flags
    from vramplan.recipe.recipe import Recipe

    return " ".join(recipe_flags(job.recipe, base or Recipe()))


def _slurm(job: Job, gpus: Gpus | None, way: Way) -> int:
    """Writes the job and its sbatch script; nothing is started."""
    from vramplan_launcher.command import per_node
    from vramplan_launcher.files import write_text
    from vramplan_launcher.job import JOB
    from vramplan_launcher.slurm import options_of, sbatch_script

    options, nodes = options_of(way.slurm_options), way.nodes.get("count", 1)
    per_node(job.processes, nodes)
    needed = predict(job, gpus)
    if needed is not None and needed.fits is False and not way.anyway:
        return _refused(needed, way)
    folder = _folder(job, needed, way).resolve()
    script = sbatch_script(
        folder / JOB,
        nodes=nodes,
        processes=job.processes,
        name=folder.name,
        options=options,
        cards=not job.cpu,
        arguments=_repeated(way),
    )
    said = None if needed is None else _predicted(job, needed)
    job.write(folder, prediction=said, fallbacks=_fallbacks(way))
    written = write_text(folder / "job.sbatch", script)
    click.echo(f"Written, not started: sbatch {written}")
    click.echo(f"When it has ended: vramplan compare {folder}")
    return 0


def _repeated(way: Way) -> list[str]:
    """What the machines' own command lines say again of how a run is made."""
    said = {"--anyway": way.anyway, "--no-archive": not way.archive, "--verbose": way.verbose}
    said["--allow-8bit-optim"] = way.allow_8bit
    fallback = ["--fallback", str(way.fallback)] if way.fallback else []
    return [name for name, given in said.items() if given] + fallback


def _fallbacks(way: Way) -> list[dict[str, Any]]:
    return [{"recipe": recipe.to_dict()} for recipe in way.fallbacks]
