"""What a job is told of ports, before it starts."""

from __future__ import annotations

import socket

import pytest
from vramplan_launcher.command import Nodes
from vramplan_launcher.job import Job
from vramplan_launcher.needs import free_port, group_of_one
from vramplan_launcher.run import Launch, ranks_command

from vramplan.recipe.recipe import DeepSpeed, Recipe

ONE = Job(model="m", recipe=Recipe(deepspeed=DeepSpeed()), cpu=True)
TWO = Job(model="m", recipe=Recipe(world_size=2), cpu=True)


def test_a_single_process_is_told_all_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert group_of_one(ONE)["MASTER_PORT"].isdigit()
    # Who has set a port has not set a rank with it.
    monkeypatch.setenv("MASTER_PORT", "4321")
    told = group_of_one(ONE)
    assert (told["MASTER_PORT"], told["RANK"], told["WORLD_SIZE"]) == ("4321", "0", "1")
    assert group_of_one(TWO) == {}


def test_deepspeeds_launcher_takes_a_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is 29500, for every run on the machine."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    how = Launch(launcher="deepspeed", nodes=Nodes())
    (given,) = (w for w in ranks_command(TWO, how) if w.startswith("--master_port="))
    with socket.create_server(("127.0.0.1", int(given.partition("=")[2]))):
        pass
    monkeypatch.setenv("MASTER_PORT", "4321")
    assert "--master_port=4321" in ranks_command(TWO, how)
    assert free_port() > 0


def test_deepspeeds_launcher_keeps_to_the_cards_that_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    job = Job(model="m", recipe=Recipe(world_size=2))
    assert "--include=localhost:2,3" in ranks_command(job, Launch(launcher="deepspeed"))
