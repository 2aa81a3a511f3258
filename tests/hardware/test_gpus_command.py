"""`vramplan gpus`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from vramplan.cli.gpus import command
from vramplan.errors import UnknownName, UserError
from vramplan.hardware import Gpus, all_gpus, nvml
from vramplan.hardware.gpu import GpuProcess
from vramplan.units import GIB

NONE = "This machine has no NVIDIA driver."


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "gpus_here", lambda: ([], NONE))


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = next(gpu for gpu in all_gpus() if gpu.id == "a10g")
    others = (GpuProcess(pid=7, used=GIB), GpuProcess(pid=8, used=None))
    found = Gpus(gpu=gpu, count=2, free=20 * GIB, others=others, indices=(0, 1))
    monkeypatch.setattr(nvml, "gpus_here", lambda: ([found], ""))


@pytest.mark.usefixtures("nothing")
def test_without_a_gpu_a_plain_sentence_comes_first_and_all_cards_follow() -> None:
    result = run()
    assert result.exit_code == 0
    assert result.output.startswith(f"{NONE}\n\nid ")
    for gpu in all_gpus():
        assert f"\n{gpu.id} " in result.output


@pytest.mark.usefixtures("two_cards")
def test_what_is_here() -> None:
    # 22587 MiB for processes: 22.1 GiB.
    assert run("--here").output == (
        "In this machine: 2 x A10G, 20.0 GiB of 22.1 GiB free each\n"
        "  in use by process 7: 1.0 GiB\n"
        "  in use by process 8: an unknown amount\n"
    )


@pytest.mark.usefixtures("nothing")
def test_here_without_a_gpu_is_no_error() -> None:
    result = run("--here")
    assert (result.exit_code, result.output) == (0, f"{NONE}\n")


def test_a_query_does_not_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nvml, "gpus_here")
    lines = run("ada", "24GB").output.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["id", "rtx-4090", "rtx-4500-ada", "l4"]
    # 24564 MiB = 24.0 GiB; 1008 GB/s; 165.2 and 82.6 TFLOPS.
    assert lines[1].split() == [
        *("rtx-4090", "24.0", "1008", "165", "82.6", "yes", "yes", "PCIe", "4.0", "x16")
    ]


@pytest.mark.usefixtures("two_cards")
def test_eighty_columns_of_plain_ascii() -> None:
    output = run().output
    assert max(map(len, output.splitlines())) <= 80
    assert output.isascii()
    assert "\x1b" not in output


def test_what_is_not_known_is_said_to_be() -> None:
    output = run("rtx-pro-5000").output
    assert output.splitlines()[1].split()[3:5] == ["-", "-"]
    assert "no rate that sources agree on" in output
    output = run("mi325x").output
    assert output.splitlines()[1].split()[1] == "~256.0"
    assert "~ the size as sold" in output


@pytest.mark.usefixtures("two_cards")
def test_json() -> None:
    document = json.loads(run("--json").output)
    assert document["schema"] == 1
    assert len(document["gpus"]) == len(all_gpus())
    (here,) = document["here"]
    assert (here["id"], here["count"], here["free"]) == ("a10g", 2, 20 * GIB)
    assert here["others"] == [{"pid": 7, "used": GIB}, {"pid": 8, "used": None}]
    assert document["here_reason"] is None


@pytest.mark.usefixtures("nothing")
def test_json_without_a_gpu() -> None:
    expected = {"schema": 1, "here": [], "here_reason": NONE}
    assert json.loads(run("--here", "--json").output) == expected


def test_json_of_a_query_is_about_cards_only() -> None:
    document = json.loads(run("t4", "--json").output)
    assert set(document) == {"schema", "gpus"}
    (card,) = document["gpus"]
    assert card["memory"] == 15_360 * 2**20
    assert card["capacity"] == 14_913 * 2**20
    assert "free" not in card
    assert "count" not in card


def test_a_query_that_matches_nothing() -> None:
    with pytest.raises(UnknownName, match="nearest: 'rtx-4090'"):
        run("4900")


def test_here_and_a_query_exclude_each_other() -> None:
    with pytest.raises(UserError, match="takes no QUERY"):
        run("--here", "t4")
