"""`vramplan launch MODEL`: run it for real, and say how the prediction held."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.launch_options import DATA, HOW, MACHINES, TRAINING

if TYPE_CHECKING:
    from vramplan_launcher.job import Job

    from vramplan.recipe.recipe import Recipe


@command_about_a_run(
    "launch",
    *DATA,
    *TRAINING,
    click.option("--resume", is_flag=True, help="Go on with a run: MODEL is its folder."),
    click.option("--random-weights", is_flag=True, help="Where there is no checkpoint."),
    *HOW,
    *MACHINES,
    cards="what is in this machine",
)
def command(ctx: click.Context, asked: Asked, **given: Any) -> None:
    """Run the fine-tuning of MODEL for real, then show what was predicted and what was measured.

    MODEL is a Hugging Face id, a folder, a plan.json, or the job.json or folder of a run. Without
    --data it runs a few steps on random tokens, to measure. Everything lies in the run's folder.

    Exit code: 0 it ended, 1 it does not fit and was not started, 2 the input is wrong, 3 out of
    memory, 4 it failed, 130 interrupted.
    """
    from dataclasses import replace

    from vramplan.cli.launch_options import way_of
    from vramplan.cli.launching import cards_for, start

    job = job_of(asked, given)
    way = way_of(given, as_json=asked.as_json, again=again(asked, "launch"))
    way = replace(way, fallbacks=planned(Path(asked.model)))
    gpus, here, reason = cards_for(job.gpu, cpu=job.cpu)
    ctx.exit(start(job, gpus, here, reason, way))


def again(asked: Asked, command: str) -> tuple[str, ...]:
    """The command line without a recipe."""
    card = ("--gpu", asked.card) if asked.card is not None else ()
    return ("vramplan", command, asked.model, *card)


def planned(path: Path) -> tuple[Recipe, ...]:
    """The smaller plans that a plan.json or a job.json names, the next one first."""
    path = path / "job.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        return ()
    from vramplan_launcher.files import read_json

    from vramplan.recipe.recipe import Recipe

    named = read_json(path, "plan").get("fallbacks") or ()
    return tuple(Recipe.from_dict(each["recipe"]) for each in named)


def job_of(asked: Asked, given: dict[str, Any]) -> Job:
    """The job that was asked for; takes its options out of `given`."""
    from vramplan_launcher.job import Job

    from vramplan.errors import UserError

    emulate, pretend = given.pop("emulate_gpu"), given.pop("pretend_ranks")
    cpu, random, resume = given.pop("cpu"), given.pop("random_weights"), given.pop("resume")
    held = held_job(asked)
    if resume:
        if held is None:
            raise UserError(f"--resume with {asked.model!r}: name the folder of a run")
        return _resumed(held[0], held[1], given, cpu)
    card = emulate or asked.card
    if held is not None:
        from dataclasses import replace

        data = data_given(given)
        job = held[0]
        changed = {"gpu": card or job.gpu, "training": _training(given, job)}
        changed |= {"data": data} if data is not None else {}
        changed |= {"cpu": True} if cpu else {}
        changed |= {"random_weights": True} if random else {}
        changed |= {"emulate": size_of(emulate)} if emulate else {}
        job = replace(job, **changed)
        return replace(job, verify=job.verify or job.data is None)
    data = data_given(given)
    return Job(
        model=asked.model,
        recipe=ranked(asked, pretend, given["hostfile"]),
        gpu=card,
        data=data,
        training=_training(given, None),
        random_weights=random,
        emulate=size_of(emulate),
        pretend_ranks=pretend,
        verify=data is None,
        cpu=cpu,
        trust_remote_code=asked.trust_remote_code,
    )


def _training(given: dict[str, Any], job: Job | None) -> Any:
    from vramplan.cli.launch_options import training_of

    return training_of(given, None if job is None else job.training)


def data_given(given: dict[str, Any]) -> dict[str, Any] | None:
    """The data that were named."""
    from vramplan.cli.launch_options import data_of

    return data_of(given)


def size_of(card: str | None) -> int | None:
    """The bytes of the card that is to be emulated."""
    if card is None:
        return None
    from vramplan.hardware.catalogue import parse_gpu

    return parse_gpu(card).gpu.capacity


def ranked(asked: Asked, pretend: int | None, hostfile: str | None = None) -> Recipe:
    """The recipe over the ranks that are pretended, a hostfile's, or the cards that were named."""
    from dataclasses import replace

    from vramplan.errors import UserError

    recipe = asked.recipe()
    named = asked.fields["world_size"]
    if pretend is not None:
        if named is not None and recipe.world_size != pretend:
            raise UserError(
                f"--pretend-ranks {pretend} and --world-size {named} contradict each other: leave "
                "one of them out"
            )
        return replace(recipe, world_size=pretend)
    if named is None and recipe.world_size == 1 and hostfile is not None:
        from vramplan_launcher.command import read_hostfile

        return replace(recipe, world_size=sum(read_hostfile(Path(hostfile)).values()))
    gpus = asked.named_gpus()
    if named is None and recipe.world_size == 1 and gpus is not None and gpus.count > 1:
        return replace(recipe, world_size=gpus.count)
    return recipe


def held_job(asked: Asked) -> tuple[Job, Path] | None:
    """The job in a plan.json, a job.json or a run's folder, and its folder; None of a model."""
    path = Path(asked.model).expanduser()
    if path.is_dir():
        path = path / "job.json"
    if path.suffix != ".json" or not path.is_file():
        return None
    from vramplan_launcher.files import read_json
    from vramplan_launcher.job import Job, read_job

    from vramplan.errors import UserError

    document = read_json(path, "plan")
    if "recipe" not in document:
        return None  # a model's config.json
    idle = [n for n, value in asked.fields.items() if value is not None]
    if idle or asked.recipe_file:
        option = "recipe" if not idle else idle[0].replace("_", "-")
        raise UserError(f"--{option} with {path.name}: its recipe is in there")
    if "training" in document:
        return read_job(path)[0], path.parent
    model = document.get("model")
    name = (model.get("source") or model.get("id")) if isinstance(model, dict) else model
    # Whatever card it was made for, it is judged by those that are here.
    return Job(model=str(name or ""), recipe=document["recipe"]), path.parent


def _resumed(job: Job, folder: Path, given: dict[str, Any], cpu: bool) -> Job:
    from dataclasses import replace

    from vramplan_launcher.run import resumed

    data_given(given)
    return resumed(replace(job, training=_training(given, job), cpu=job.cpu or cpu), folder)
