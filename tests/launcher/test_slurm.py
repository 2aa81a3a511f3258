"""The script for Slurm: it is run, with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher.slurm import options_of, sbatch_script

from vramplan.errors import InvalidValue, UserError

JOB = Path("/shared/a run/job.json")


def script(**options: Any) -> str:
    return sbatch_script(JOB, **{"nodes": 2, "processes": 4, "name": "run", **options})


def ran(text: str, tools: Path, **variables: str) -> list[str]:
    """What the script gives srun."""
    (tools / "scontrol").write_text('#!/bin/sh\n[ "$3" = "n[0-1]" ] && printf "n0\\nn1\\n"\n')
    (tools / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    told = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "20077"}
    done = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=False,
        env={**told, "SLURM_JOB_NODELIST": "n[0-1]", **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def head(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    # Slurm reads options up to the first line that is no comment.
    assert text.splitlines()[1 : len(lines) + 1] == lines
    words = (word for line in lines for word in shlex.split(line)[1:])
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def test_each_machine_launches_and_they_meet_at_the_first(tmp_path: Path) -> None:
    kept, *command = ran(script(arguments=["--fallback", "1"]), tmp_path)
    assert kept == "--kill-on-bad-exit=0"  # a parent that failed has still to write how
    assert command[:5] == [sys.executable, "-m", "vramplan", "launch", str(JOB)]
    # Job 20077 meets at port 20000 + 20077 % 10000 = 20077; no other job of the machine does.
    assert command[5:] == [
        *("--output", str(JOB.parent), "--fallback", "1"),
        *("--nnodes", "2", "--rendezvous", "n0:20077"),
    ]


def test_the_cores_that_sbatch_was_given_reach_the_ranks(tmp_path: Path) -> None:
    assert "--cpus-per-task=8" in ran(script(), tmp_path, SLURM_CPUS_PER_TASK="8")


def test_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_of(["partition=gpu", "--time=02:00:00", "exclusive", "comment=two words"])
    assert head(script(name="llama 8b", options=options)) == {
        "job-name": "llama 8b",
        "nodes": "2",
        "ntasks-per-node": "1",
        "output": "/shared/a run/slurm-%j.txt",
        "chdir": str(tmp_path),  # paths of data and model are as they were given here
        "gpus-per-node": "2",
        "partition": "gpu",
        "time": "02:00:00",
        "exclusive": "",
        "comment": "two words",
    }


def test_cards_are_asked_for_once_and_where_there_are_some() -> None:
    assert "gpus-per-node" not in head(script(cards=False))
    with_gres = head(script(options={"gres": "gpu:a100:2"}))
    assert with_gres["gres"] == "gpu:a100:2"
    assert "gpus-per-node" not in with_gres


@pytest.mark.parametrize("text", ["=3", "", "a b=3", "--", "-p gpu"])
def test_what_is_no_option_of_sbatch(text: str) -> None:
    with pytest.raises(InvalidValue, match="an option of sbatch: partition=gpu"):
        options_of([text])


def test_scripts_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"nodes: it follows from the run \(--nnodes\)"):
        options_of(["nodes=3"])
    with pytest.raises(UserError, match="3 processes on 2 machines"):
        script(processes=3)
    with pytest.raises(InvalidValue, match="one line"):
        script(options={"comment": "a\nrm -rf b"})
