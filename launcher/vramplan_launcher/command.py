"""Commands that start a run: Python's own for one process, the existing launchers for several.

Pure: nothing is started, and nothing heavy is imported. Options and their names: torch 2.13,
distributed/run.py (get_args_parser); DeepSpeed 0.19.8, launcher/runner.py (parse_args).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vramplan.errors import InvalidValue, UnknownName, UserError

if TYPE_CHECKING:
    from vramplan.recipe.recipe import Recipe

CHILD = "vramplan_launcher.train"
"""The module that every process runs, with the job file as its argument."""
PORT = 29500
"""The port of both launchers where none is given."""

Launcher = Literal["auto", "python", "torchrun", "deepspeed"]
LAUNCHERS: tuple[Launcher, ...] = ("auto", "python", "torchrun", "deepspeed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The machines of a run, as one of the launchers takes them.

    Either `hostfile` (DeepSpeed starts all machines over ssh), or `rendezvous` (torchrun is started
    on each machine, and they meet there). All of them see the job file under the same path.
    """

    count: int = 1
    """Machines, each with as many processes."""
    rendezvous: str | None = None
    """host or host:port of the machine where all meet."""
    rank: int | None = None
    """This machine's number, from 0 (the rendezvous): needed only where a machine can't tell
    whether it is the rendezvous; None lets them agree."""
    id: str = "vramplan"
    """Tells runs apart that meet at one place."""
    hostfile: Path | None = None
    """A file of lines `host slots=4`."""

    def __post_init__(self) -> None:
        _at_least("nnodes", self.count, 1)
        if self.rank is not None and not 0 <= self.rank < self.count:
            raise InvalidValue("node_rank", self.rank, f"from 0 to {self.count - 1}")
        if self.hostfile is not None and (self.rendezvous or self.rank is not None):
            raise UserError(
                "hostfile with a rendezvous or a node's rank: DeepSpeed starts all machines of a "
                "hostfile by itself. Leave one of them out"
            )
        if self.count > 1 and self.hostfile is None and not self.rendezvous:
            raise UserError(
                f"{self.count} machines and no place to meet: give the rendezvous (host:port of "
                "one of them), the same on each, or a hostfile"
            )


def command_for(
    job: Path,
    *,
    processes: int,
    nodes: Nodes | None = None,
    launcher: Launcher = "auto",
    port: int | None = None,
    visible: str | None = None,
    child: str = CHILD,
) -> list[str]:
    """The command that runs `job` in `processes` processes (of all machines together).

    "auto" is plain Python for one process, DeepSpeed's launcher for a hostfile, else torchrun.
    `port` is DeepSpeed's on one machine; torchrun finds a free one by itself. `visible` is the
    value of CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher would otherwise pass over.

    Raises UserError: processes that don't spread evenly, or a launcher that can't start them.
    """
    _at_least("processes", processes, 1)
    if launcher not in LAUNCHERS:
        raise UnknownName("launcher", launcher, LAUNCHERS)
    nodes = nodes or Nodes()
    chosen = launcher if launcher != "auto" else _launcher_for(processes, nodes)
    if chosen == "python":
        if processes > 1 or nodes.count > 1 or nodes.hostfile is not None:
            raise UserError("plain python starts one process: take torchrun or deepspeed")
        return [sys.executable, "-m", child, str(job)]
    if chosen == "torchrun":
        return _torchrun(job, processes, nodes, child)
    return [*_deepspeed(processes, nodes, port, visible), "--module", child, str(job)]


def _launcher_for(processes: int, nodes: Nodes) -> Launcher:
    if nodes.hostfile is not None:
        return "deepspeed"
    return "python" if processes == 1 and nodes.count == 1 else "torchrun"


def _torchrun(job: Path, processes: int, nodes: Nodes, child: str) -> list[str]:
    if nodes.hostfile is not None:
        raise UserError("torchrun reads no hostfile: take deepspeed, or give a rendezvous")
    command = [sys.executable, "-m", "torch.distributed.run"]
    if nodes.count == 1:
        command.append("--standalone")
    else:
        assert nodes.rendezvous is not None
        host, meeting = _endpoint(nodes.rendezvous)
        command.append(f"--nnodes={nodes.count}")
        if nodes.rank is None:
            command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={host}:{meeting}"]
            command.append(f"--rdzv-id={nodes.id}")
        else:
            command += [f"--node-rank={nodes.rank}", f"--master-addr={host}"]
            command.append(f"--master-port={meeting}")
    command.append(f"--nproc-per-node={per_node(processes, nodes.count)}")
    return [*command, "--module", child, str(job)]


def _deepspeed(processes: int, nodes: Nodes, port: int | None, visible: str | None) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if nodes.hostfile is not None:
        hosts = read_hostfile(nodes.hostfile)
        slots = sum(hosts.values())
        if slots != processes:
            raise UserError(
                f"hostfile {str(nodes.hostfile)!r} has {slots} slots on {len(hosts)} machines, and "
                f"the run has {processes} processes: set world_size to {slots}, or mend the slots"
            )
        # Over ssh even to a single machine, which need not be this one.
        command += [f"--hostfile={nodes.hostfile}", "--force_multi"]
    elif nodes.count > 1:
        # Without a hostfile it takes the cards of the machine that it is started on, alone.
        raise UserError(
            "deepspeed's launcher starts several machines from a hostfile: give one, or take "
            "torchrun"
        )
    else:
        # A hostfile at its default place (/job/hostfile) would be taken unasked.
        command += ["--hostfile=", _local_cards(processes, visible)]
    if port is not None:
        command.append(f"--master_port={port}")
    # The child reads LOCAL_RANK, as under torchrun: no --local_rank in its arguments.
    return [*command, "--no_local_rank"]


def _local_cards(processes: int, visible: str | None) -> str:
    """--num_gpus takes the first cards of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    if not visible:
        return f"--num_gpus={processes}"
    cards = [card.strip() for card in visible.split(",") if card.strip()]
    if not all(card.isdigit() for card in cards):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}: deepspeed's launcher takes numbers only. Take "
            "torchrun"
        )
    if len(cards) < processes:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, {len(cards)} cards, and the run has "
            f"{processes} processes"
        )
    return f"--include=localhost:{','.join(cards[:processes])}"


def per_node(processes: int, nodes: int) -> int:
    """Processes on each of the machines. Raises UserError where they don't spread evenly."""
    if processes % nodes:
        raise UserError(
            f"{processes} processes on {nodes} machines: each machine has as many. Set world_size "
            f"to a multiple of {nodes}"
        )
    return processes // nodes


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(PORT)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidValue("rendezvous", text, "host, or host:port")
    return host, int(port)


# --- hostfiles ------------------------------------------------------------------------------


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by host, in the file's order. Raises UserError, which names file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"can't read hostfile {str(path)!r}: {reason}") from error
    return parse_hostfile(text, name=str(path))


def parse_hostfile(text: str, *, name: str = "hostfile") -> dict[str, int]:
    """Lines `host slots=4`, blank ones and comments aside, as DeepSpeed reads them."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip().split()
        if not words or words[0].startswith("#"):
            continue
        place = f"hostfile {name!r}, line {number}"
        key, _, count = (words[1] if len(words) > 1 else "").partition("=")
        if key != "slots" or not count.isdigit() or int(count) < 1:
            raise UserError(f"{place} is {line.strip()!r}: write 'host slots=4'")
        if words[0] in hosts:
            raise UserError(f"{place} names {words[0]!r} again: a machine has one line")
        hosts[words[0]] = int(count)
    if not hosts:
        raise UserError(f"hostfile {name!r} names no machine: write lines 'host slots=4'")
    return hosts


# --- the environment ------------------------------------------------------------------------


def environment_for(
    recipe: Recipe,
    *,
    processes: int = 1,
    cores: int | None = None,
    offline: bool = False,
    given: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Variables to lay over the environment of a run of `recipe`.

    `processes` are those on this machine, `cores` its processor's, `given` what is set already:
    a thread count set by the user stays; the allocator is the recipe's, as the estimate is.
    """
    segments = "True" if recipe.allocator == "expandable_segments" else "False"
    made = {
        # Two names of one setting: torch below 2.9 knows the first alone, 2.9 warns of it and
        # wants the second, 2.13 reads either (c10/core/AllocatorConfig.h).
        "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{segments}",
        "PYTORCH_ALLOC_CONF": f"expandable_segments:{segments}",
        # Rows are tokenized in threads, before anything forks that would tokenize.
        "TOKENIZERS_PARALLELISM": "true",
        # A process that dies leaves its last lines, and its stack, in the log.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    # torchrun gives each of several processes one thread (distributed/run.py,
    # config_from_args): CPU-Adam would step on one core.
    if processes > 1 and cores is not None and not (given or {}).get("OMP_NUM_THREADS"):
        made["OMP_NUM_THREADS"] = str(max(1, cores // processes))
    if offline:
        made |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return made


DEEPSPEED_ENV = "DS_ENV_FILE"
"""Names the file of variables that DeepSpeed's launcher sets on other machines; of its own it
passes NCCL_*, PYTHON* and a few more (launcher/runner.py, EXPORT_ENVS)."""


def deepspeed_env_file(environment: Mapping[str, str]) -> str:
    """The text of the file that `DS_ENV_FILE` names."""
    for name, value in environment.items():
        if "\n" in value:
            raise InvalidValue(name, value, "one line")
    return "".join(f"{name}={value}\n" for name, value in environment.items())


def _at_least(thing: str, value: object, least: int) -> None:
    if type(value) is bool or not isinstance(value, int) or value < least:
        raise InvalidValue(thing, value, f"an integer of at least {least}")
