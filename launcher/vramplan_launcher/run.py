"""The parent: makes the run's folder, starts the ranks, watches them, and ends them all.

It needs no torch. Ranks are started by Python, torchrun or deepspeed, in a session of their own,
so that Ctrl-C reaches them through `Watch` alone.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vramplan.errors import UserError
from vramplan_launcher.command import (
    DEEPSPEED_ENV,
    Launcher,
    Nodes,
    command_for,
    deepspeed_env_file,
    environment_for,
    read_hostfile,
)
from vramplan_launcher.failures import diagnose
from vramplan_launcher.files import write_json, write_text
from vramplan_launcher.hosts import passed_on, without_names
from vramplan_launcher.job import JOB, Job
from vramplan_launcher.measurement import assemble, reports, write_measurement
from vramplan_launcher.needs import free_port, free_stale_locks, group_of_one
from vramplan_launcher.watch import GRACE, Watch

LOG = "log.txt"
CODES = {"ended": 0, "does_not_fit": 1, "refused": 2, "out_of_memory": 3, "failed": 4}
"""Exit codes by outcome; an interrupted run's is 130."""
INTERRUPTED = 130
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BEFORE = re.compile(
    r"job\.(json|sbatch)|plan\.json|command\.sh|ds_config\.json|(log|slurm)-.*\.txt"
)
_LAST_WRITTEN = "trainer_state.json"
"""Trainer._save_checkpoint (transformers 5.17) writes it after everything else."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the ranks of a job are started."""

    launcher: Launcher = "auto"
    """auto: plain Python for one rank, DeepSpeed's for a hostfile, else torchrun."""
    nodes: Nodes | None = None
    """Several machines; None is this one."""
    echo: bool = False
    """Show all that the ranks print."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The ranks' machines where a hostfile names them."""
        if self.nodes is None or self.nodes.hostfile is None:
            return ()
        slots = read_hostfile(self.nodes.hostfile)
        return tuple(host for host, count in slots.items() for _ in range(count))

    @property
    def meets(self) -> bool:
        """Whether each machine has a parent of its own."""
        return self.nodes is not None and self.nodes.rendezvous is not None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    outcome: str
    folder: Path
    measurement: dict[str, Any] = field(repr=False)
    sentence: str = ""
    """What went wrong, and what to do about it."""
    reporting: bool = True
    """Of several parents, whether this one has the first rank, and tells of all."""

    @property
    def code(self) -> int:
        """The exit code."""
        return CODES.get(self.outcome, INTERRUPTED)


# --- folders --------------------------------------------------------------------------------


def new_folder(wanted: Path, *, exactly: bool) -> Path:
    """Makes the run's folder: `wanted`, or the next free name after it unless `exactly`.

    Raises UserError rather than write into a folder that is there.
    """
    for number in range(1, 10_000):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if exactly:
                raise UserError(
                    f"{str(wanted)!r} is there already, and a run's folder is never overwritten: "
                    "name another with --output, or go on with it by --resume"
                ) from None
            continue
        except OSError as error:
            raise UserError(f"can't make {str(folder)!r}: {error.strerror}") from error
        return folder
    raise UserError(f"no free name after {str(wanted)!r}")


def shared_folder(wanted: Path) -> Path:
    """The run's folder where each machine has a parent: the first of them makes it.

    Raises UserError for a folder that holds more than parents put there before a run begins.
    """
    wanted.mkdir(parents=True, exist_ok=True)
    held = {path.name for path in wanted.iterdir() if not path.name.startswith(".")}
    begun = [name for name in sorted(held) if not _BEFORE.fullmatch(name)]
    if begun:
        raise UserError(
            f"{str(wanted)!r} holds {begun[0]} already, and a run's folder is never overwritten: "
            "name another with --output, the same on each machine"
        )
    return wanted


def folder_name(job: Job, model: str) -> str:
    """ "Llama-3.2-1B-qlora": what a run is called where no name is given."""
    recipe = job.recipe
    method = "full" if recipe.lora is None else "lora"
    if recipe.lora is not None and recipe.quantization is not None:
        method = "int8-lora" if recipe.quantization == "int8" else "qlora"
    zero = "" if recipe.deepspeed is None else f"-zero{recipe.deepspeed.stage}"
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', model.rsplit('/', 1)[-1])}-{method}{zero}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, the newest last."""
    found = [
        (int(match[1]), path)
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / _LAST_WRITTEN).exists()
    ]
    return [path for _, path in sorted(found)]


def drop_incomplete(folder: Path) -> list[str]:
    """Deletes checkpoints that a death cut off; earlier ones are left alone. Their names."""
    import shutil

    kept = set(complete_checkpoints(folder))
    gone = [p for p in (folder / "checkpoints").glob("checkpoint-*") if p not in kept]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in gone]


def resumed(job: Job, folder: Path) -> Job:
    """`job` going on from the newest complete checkpoint of a run's folder, or of a checkpoint.

    Raises UserError where there is none.
    """
    if (folder / _LAST_WRITTEN).exists():
        checkpoint = folder
    else:
        found = complete_checkpoints(folder)
        if not found:
            raise UserError(f"no complete checkpoint in {str(folder)!r} to resume from")
        checkpoint = found[-1]
    return replace(job, training=replace(job.training, resume=str(checkpoint.resolve())))


# --- a run ----------------------------------------------------------------------------------


def launch(
    job: Job,
    folder: Path,
    *,
    prediction: Mapping[str, Any] | None = None,
    how: Launch = Launch(),
    hear: Callable[[dict[str, Any]], None] = lambda event: None,
    beside: Mapping[str, Any] | None = None,
) -> Outcome:
    """Runs `job` in `folder`, which `new_folder` made, to its end.

    `hear` gets every event of the ranks; `beside` goes into job.json.
    """
    more = {"prediction": prediction, **(beside or {})}
    path = job.write(folder, **more)
    _write_ds_config(job, folder)
    local = local_processes(job, how)
    command = ranks_command(job, how, path.resolve())
    environment = _environment(job, folder, how)
    _write_command(folder, command, environment)
    began = time.time()
    log = new_log(folder, how)
    watch = Watch(
        command, {**os.environ, **environment}, log, hear=hear, echo=how.echo, hosts=how.hosts
    )
    if how.nodes is not None and how.meets and how.nodes.count > 1:
        place = f"{how.nodes.count} machines at {how.nodes.rendezvous}"
        hear({"event": "note", "text": f"Waiting for {place} ..."})
    code = watch.run()
    reporting = not how.meets or 0 in watch.ranks
    ranks = _all_reports(folder, job.processes if how.meets and reporting else 0)
    failure = _failure(code, ranks, log, local, watch)
    document = assemble(
        job,
        more,
        ranks,
        name=folder.name,
        expected=local if not watch.interrupted else len(ranks) or 1,
        seconds=time.time() - began,
        failure=failure,
    )
    if watch.interrupted and document["outcome"] in ("ended", "failed"):
        document["outcome"] = "interrupted"
    elif document["outcome"] == "interrupted" and not watch.interrupted:
        document["notes"].append(
            "not stopped here: a rank, or another machine's parent, was asked to stop, or died"
        )
    if reporting or not watch.ranks:
        dropped = drop_incomplete(folder)
        if dropped:
            document["notes"].append(f"deleted what was half-written: {', '.join(dropped)}")
        try:
            write_measurement(folder, document)
        except UserError as error:
            failure = failure or {"sentence": str(error), "advice": ""}
            document |= {"outcome": "failed", "failure": failure}
    return Outcome(
        outcome=document["outcome"],
        folder=folder,
        measurement=document,
        sentence="" if failure is None else f"{failure['sentence']} {failure['advice']}".strip(),
        reporting=reporting,
    )


def ranks_command(job: Job, how: Launch, path: Path = Path(JOB)) -> list[str]:
    """The command that runs the job in a file. Raises UserError where nothing can start it so."""
    return command_for(
        path,
        processes=job.processes,
        nodes=how.nodes,
        launcher=how.launcher,
        port=_port(how),
        visible=None if job.cpu else os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _port(how: Launch) -> int | None:
    """DeepSpeed's, which it takes for free: $MASTER_PORT, or here one that is."""
    given = os.environ.get("MASTER_PORT", "")
    if given.isdigit():
        return int(given)
    return None if how.hosts else free_port()


def new_log(folder: Path, how: Launch) -> Path:
    """The log's place; of several parents each has one, named after its machine."""
    if not how.meets:
        return folder / LOG
    stem = f"log-{socket.gethostname()}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 10_000)))
    for log in (folder / f"{name}.txt" for name in names):
        with suppress(FileExistsError):
            log.touch(exist_ok=False)
            return log
    raise UserError(f"no free name for a log in {str(folder)!r}")


def _all_reports(folder: Path, expected: int) -> list[dict[str, Any]]:
    """What the ranks wrote; those of other machines have a moment to write it."""
    until = time.monotonic() + GRACE
    while len(found := reports(folder)) < expected and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _environment(job: Job, folder: Path, how: Launch) -> dict[str, str]:
    """What is laid over the environment of the ranks, here and on the machines of a hostfile."""
    hosts = how.hosts
    here = max(map(hosts.count, hosts)) if hosts else local_processes(job, how)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    made = environment_for(job.recipe, processes=here, cores=cores, given=os.environ)
    made |= group_of_one(job)
    if job.cpu:
        made |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if job.recipe.deepspeed is not None:
        free_stale_locks()
        made |= _plain_architectures(os.environ) | _own_tools(os.environ)
    if hosts:
        told = deepspeed_env_file({**passed_on(os.environ), **made})
        made[DEEPSPEED_ENV] = str(write_text(folder / "deepspeed.env", told).resolve())
    return made


def _own_tools(given: Mapping[str, str]) -> dict[str, str]:
    """This Python's folder first on PATH: ninja, which compiles DeepSpeed's ops, lies there, and
    an environment that was not activated is not on PATH."""
    own = str(Path(sys.executable).parent)
    return {"PATH": os.pathsep.join(filter(None, (own, given.get("PATH"))))}


def _plain_architectures(given: Mapping[str, str]) -> dict[str, str]:
    """TORCH_CUDA_ARCH_LIST without the letters that DeepSpeed's builder can't read ("9.0a").

    Source: DeepSpeed 0.19.8, ops/op_builder/builder.py, CUDAOpBuilder.filter_ccs.
    """
    listed = given.get("TORCH_CUDA_ARCH_LIST", "")
    plain = re.sub(r"(\d)[a-z]\b", r"\1", listed)
    return {} if plain == listed else {"TORCH_CUDA_ARCH_LIST": plain}


def local_processes(job: Job, how: Launch) -> int:
    """Of this machine; with a hostfile of all, since one parent starts them."""
    if how.nodes is None or how.nodes.hostfile is not None or job.processes == 1:
        return job.processes
    return max(1, job.processes // how.nodes.count)


def _failure(
    code: int, ranks: Sequence[Mapping[str, Any]], log: Path, expected: int, watch: Watch
) -> dict[str, Any] | None:
    """What went wrong, in a sentence; None where nothing did."""
    refused = next((rank for rank in ranks if rank["outcome"] == "refused"), None)
    if refused is not None:
        return {"kind": "refused", "sentence": str(refused["error"]), "advice": "", "code": code}
    ends = {rank["outcome"] for rank in ranks}
    if watch.interrupted or (ends <= {"ended", "interrupted"} and len(ranks) >= expected):
        return None
    if "out_of_memory" in ends:
        return None  # told with its figures
    text = without_names("".join(watch.tail), watch.hosts)
    found = diagnose(watch.worst(code), text, log_path=log)
    return {
        "kind": found.kind,
        "sentence": found.sentence,
        "advice": found.advice,
        "code": watch.worst(code),
        "log": str(log),
    }


def _write_ds_config(job: Job, folder: Path) -> None:
    if job.recipe.deepspeed is None:
        return
    from vramplan.models.hf_config import architecture
    from vramplan.models.locate import locate
    from vramplan_launcher.deepspeed_config import Hyperparameters, ds_config

    train = job.training
    hyper = Hyperparameters(
        learning_rate=job.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    arch = architecture(locate(job.model).config)
    write_json(folder / "ds_config.json", ds_config(arch, job.recipe, hyper=hyper).values)


def _write_command(folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
    """What was started, to be started again by hand."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(shlex.join(command))
    write_text(folder / "command.sh", "#!/bin/sh\n" + "\n".join(lines) + "\n")
