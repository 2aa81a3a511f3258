"""Commands, as the launchers' own parsers read them; environments, hostfiles and Slurm scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher.command import (
    CHILD,
    DEEPSPEED_ENV,
    Nodes,
    command_for,
    deepspeed_env_file,
    environment_for,
    parse_hostfile,
    read_hostfile,
)

from vramplan import Recipe
from vramplan.errors import InvalidValue, UserError

JOB = Path("/runs/my run/job.json")


def as_torchrun_reads(command: list[str]) -> Any:
    run = pytest.importorskip("torch.distributed.run")
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    arguments = run.get_args_parser().parse_args(command[3:])
    config, program, program_arguments = run.config_from_args(arguments)
    assert (arguments.module, program_arguments[-1]) == (True, str(JOB))
    assert [program, *program_arguments][-3:] == ["-m", CHILD, str(JOB)]
    return arguments, config


def as_deepspeed_reads(command: list[str]) -> Any:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    arguments = runner.parse_args(command[3:])
    assert arguments.module
    assert arguments.no_local_rank
    assert (arguments.user_script, arguments.user_args) == (CHILD, [str(JOB)])
    return arguments


def test_one_process_is_plain_python() -> None:
    assert command_for(JOB, processes=1) == [sys.executable, "-m", CHILD, str(JOB)]


def test_several_on_one_machine_meet_at_a_port_that_torchrun_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun would set it in this process
    arguments, config = as_torchrun_reads(command_for(JOB, processes=4))
    assert arguments.standalone
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (1, 1, 4)


def test_several_machines_meet_at_a_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nodes = Nodes(count=2, rendezvous="node-0:4000", id="job 7")
    _, config = as_torchrun_reads(command_for(JOB, processes=16, nodes=nodes))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "node-0:4000")
    assert config.run_id == "job 7"


def test_a_machine_that_is_told_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nodes = Nodes(count=2, rendezvous="node-0", rank=1)
    arguments, config = as_torchrun_reads(command_for(JOB, processes=2, nodes=nodes))
    assert (arguments.node_rank, arguments.master_port) == (1, 29500)
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "node-0:29500")
    assert config.rdzv_configs["rank"] == 1


def test_a_hostfile_is_deepspeeds(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\nnode-0 slots=2\n\nnode-1 slots=2  # both\n")
    command = command_for(JOB, processes=4, nodes=Nodes(hostfile=hostfile))
    arguments = as_deepspeed_reads(command)
    assert arguments.hostfile == str(hostfile)
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert dict(runner.fetch_hostfile(arguments.hostfile)) == read_hostfile(hostfile)
    with pytest.raises(UserError, match="has 4 slots on 2 machines, and the run has 8 processes"):
        command_for(JOB, processes=8, nodes=Nodes(hostfile=hostfile))


def test_deepspeed_on_one_machine_takes_no_hostfile_unasked() -> None:
    arguments = as_deepspeed_reads(command_for(JOB, processes=2, launcher="deepspeed", port=4000))
    assert (arguments.hostfile, arguments.num_gpus, arguments.master_port) == ("", 2, 4000)


def test_deepspeed_keeps_to_the_visible_cards() -> None:
    command = command_for(JOB, processes=2, launcher="deepspeed", visible="3, 5,6")
    arguments = as_deepspeed_reads(command)
    assert (arguments.include, arguments.num_gpus) == ("localhost:3,5", -1)
    runner = pytest.importorskip("deepspeed.launcher.runner")
    pool = {"localhost": list(range(8))}
    assert runner.parse_resource_filter(pool, include_str=arguments.include) == {
        "localhost": [3, 5]
    }
    with pytest.raises(UserError, match="'3', 1 cards, and the run has 2 processes"):
        command_for(JOB, processes=2, launcher="deepspeed", visible="3")
    with pytest.raises(UserError, match="takes numbers only. Take torchrun"):
        command_for(JOB, processes=1, launcher="deepspeed", visible="GPU-8f6a")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"processes": 0}, "processes is 0: it must be an integer of at least 1"),
    "launcher": ({"processes": 1, "launcher": "torchrum"}, "nearest: 'torchrun'"),
    "python": ({"processes": 2, "launcher": "python"}, "plain python starts one process"),
    "uneven": (
        {"processes": 3, "nodes": Nodes(count=2, rendezvous="a")},
        "3 processes on 2 machines: each machine has as many",
    ),
    "several": (
        {"processes": 2, "nodes": Nodes(count=2, rendezvous="a"), "launcher": "deepspeed"},
        "starts several machines from a hostfile",
    ),
    "port": (
        {"processes": 2, "nodes": Nodes(count=2, rendezvous="a:http")},
        "rendezvous is 'a:http': it must be host, or host:port",
    ),
    "hostfile": (
        {"processes": 2, "nodes": Nodes(hostfile=Path("/no/hosts")), "launcher": "torchrun"},
        "torchrun reads no hostfile",
    ),
    "no hostfile": (
        {"processes": 2, "nodes": Nodes(hostfile=Path("/no/hosts"))},
        "can't read hostfile '/no/hosts': No such file or directory",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_commands_that_cannot_be(case: str) -> None:
    options, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        command_for(JOB, **options)


def test_nodes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="2 machines and no place to meet"):
        Nodes(count=2)
    with pytest.raises(InvalidValue, match="node_rank is 2: it must be from 0 to 1"):
        Nodes(count=2, rendezvous="a", rank=2)
    with pytest.raises(UserError, match="DeepSpeed starts all machines"):
        Nodes(hostfile=Path("hosts"), rendezvous="a")
    with pytest.raises(InvalidValue, match="nnodes is 0"):
        Nodes(count=0)


HOSTFILES = {
    "": "names no machine",
    "# a slots=2": "names no machine",
    "a": "line 1 is 'a': write 'host slots=4'",
    "a slots=2\nb:4": "line 2 is 'b:4': write",
    "a slots=": "line 1 is",
    "a slots=0": "line 1 is",
    "a slots=two": "line 1 is",
    "a slots=2\nb slots=1\na slots=2": "line 3 names 'a' again",
}


@pytest.mark.parametrize("text", HOSTFILES)
def test_hostfiles_that_cannot_be(text: str) -> None:
    with pytest.raises(UserError, match=HOSTFILES[text]):
        parse_hostfile(text)


def test_the_environment_is_the_recipes() -> None:
    made = environment_for(Recipe())
    assert made["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert made["PYTORCH_ALLOC_CONF"] == made["PYTORCH_CUDA_ALLOC_CONF"]
    assert "OMP_NUM_THREADS" not in made
    assert "HF_HUB_OFFLINE" not in made
    other = environment_for(Recipe(allocator="default"), offline=True)
    assert other["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False"
    assert (other["HF_HUB_OFFLINE"], other["HF_DATASETS_OFFLINE"]) == ("1", "1")


def test_several_processes_share_the_cores() -> None:
    recipe = Recipe()
    # torchrun would give each one thread: 64 cores // 4 processes = 16
    assert environment_for(recipe, processes=4, cores=64)["OMP_NUM_THREADS"] == "16"
    assert environment_for(recipe, processes=4, cores=2)["OMP_NUM_THREADS"] == "1"
    given = environment_for(recipe, processes=4, cores=64, given={"OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in given  # what the user set stays


def test_torch_warns_of_neither_name() -> None:
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch; torch.zeros(1)"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment_for(Recipe())},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_variables_for_other_machines_as_deepspeed_reads_them(tmp_path: Path) -> None:
    # launcher/runner.py, main: key, val = var.split('=', maxsplit=1) of each line.
    made = environment_for(Recipe())
    lines = deepspeed_env_file(made).splitlines()
    assert dict(line.split("=", maxsplit=1) for line in lines) == made
    with pytest.raises(InvalidValue, match="one line"):
        deepspeed_env_file({"A": "b\nc"})
    pytest.importorskip("deepspeed")
    import inspect

    from deepspeed.launcher import runner

    assert DEEPSPEED_ENV in inspect.getsource(runner)
