"""The commands are run: two machines that are this one, and DeepSpeed's launcher on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from vramplan_launcher.command import Nodes, command_for

# Each process meets the others, and says who it is and what it was told.
CHILD = """
import os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
who = ("CHILD", dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"], *sys.argv[1:])
os.write(1, (" ".join(map(str, who)) + "\\n").encode())  # at once: two ranks share the pipe
dist.destroy_process_group()
"""
pytest.importorskip("torch")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def started(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    (folder / "a_child.py").write_text(CHILD)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **variables},
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return sorted(line for line in out.splitlines() if line.startswith("CHILD "))


@pytest.mark.parametrize("ranked", [False, True], ids=["agreed", "told"])
def test_two_machines_meet(tmp_path: Path, ranked: bool) -> None:
    meeting, job = f"127.0.0.1:{free_port()}", tmp_path / "a job.json"
    machines = []
    for number in range(2):
        nodes = Nodes(count=2, rendezvous=meeting, rank=number if ranked else None)
        command = command_for(job, processes=2, nodes=nodes, child="a_child")
        machines.append(started(command, tmp_path))
    lines = sorted(line for machine in machines for line in said(machine))
    assert lines == [f"CHILD {rank} 2 0 {job}" for rank in range(2)]


def test_deepspeeds_launcher(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    job = tmp_path / "a job.json"
    command = command_for(job, processes=2, launcher="deepspeed", port=free_port(), child="a_child")
    process = started(command, tmp_path, DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    assert said(process) == [f"CHILD {rank} 2 {rank} {job}" for rank in range(2)]


def test_plain_python(tmp_path: Path) -> None:
    job = tmp_path / "a job.json"
    command = command_for(job, processes=1, child="a_child")
    assert command[0] == sys.executable
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    process = started(command, tmp_path, MASTER_PORT=str(free_port()), **variables)
    assert said(process) == [f"CHILD 0 1 0 {job}"]
