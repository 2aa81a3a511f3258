"""A script for Slurm: on each machine `vramplan launch`, as one would start it by hand. Pure."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vramplan.errors import InvalidValue, UserError
from vramplan_launcher.command import per_node

_OURS = {"nodes": "--nnodes", "ntasks-per-node": "one parent a machine", "output": "--output"}
"""Options of sbatch that follow from the run, and from what."""
_CARDS = {"gres", "gpus", "gpus-per-node", "gpus-per-task"}


def sbatch_script(
    job: Path,
    *,
    nodes: int,
    processes: int,
    name: str,
    options: Mapping[str, str] | None = None,
    cards: bool = True,
    arguments: Sequence[str] = (),
) -> str:
    """A script for `sbatch`: a `vramplan launch` of `job` on each machine, which meet at the first.

    `processes` are those of all machines; `options` are further #SBATCH lines, an empty value
    where sbatch takes none; `arguments` are further ones of `vramplan launch`. The job's folder
    lies where every machine sees it.
    """
    each = per_node(processes, nodes)
    chosen = dict(options or {})
    head = {
        "job-name": name,
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "output": f"{job.parent}/slurm-%j.txt",
        "chdir": str(Path.cwd()),
    }
    if cards and not _CARDS & set(chosen):
        head["gpus-per-node"] = str(each)
    head |= chosen
    lines = [_line(key, value) for key, value in head.items()]
    run = [
        shlex.join([sys.executable, "-m", "vramplan", "launch", str(job)]),
        shlex.join(["--output", str(job.parent), *arguments]),
        f'--nnodes {nodes} --rendezvous "$first:$port"',
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            "set -euo pipefail",
            "# All machines meet at the first, at a port that no other job has.",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "port=$((20000 + SLURM_JOB_ID % 10000))",
            "# srun does not take --cpus-per-task from sbatch (Slurm 22.05 and later). Parents end",
            "# by themselves, whichever failed, after they have written how.",
            "srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
            " \\",
            "  " + " \\\n    ".join(run),
            "",
        ]
    )


def options_of(given: Sequence[str]) -> dict[str, str]:
    """`partition=gpu`, or `exclusive` alone, as sbatch names them. Raises UserError."""
    found: dict[str, str] = {}
    for text in given:
        key, _, value = text.removeprefix("--").partition("=")
        if not key or not key.replace("-", "").isalnum() or key.startswith("-"):
            raise InvalidValue("--slurm-option", text, "an option of sbatch: partition=gpu")
        if key in _OURS:
            raise UserError(f"--slurm-option {key}: it follows from the run ({_OURS[key]})")
        found[key] = value
    return found


def _line(key: str, value: str) -> str:
    """Slurm reads it itself, without a shell's rules: quotes for blanks."""
    if "\n" in value or '"' in value:
        raise InvalidValue(f"Slurm option {key!r}", value, "one line without quotes")
    if not value:
        return f"#SBATCH --{key}"
    return f'#SBATCH --{key}="{value}"' if " " in value else f"#SBATCH --{key}={value}"
