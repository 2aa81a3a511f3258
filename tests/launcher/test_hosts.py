"""Machines of a hostfile: DeepSpeed's launcher for real, with stand-ins for ssh and pdsh."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vramplan_launcher.command import CHILD
from vramplan_launcher.hosts import check_hosts, passed_on, without_names
from vramplan_launcher.watch import Watch

from vramplan.errors import UserError

if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)

# Both run the command here. "down" can't be reached, "bare" has not what is asked for.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
host=$1; shift
[ "$host" != down ] || { echo "ssh: connect to host down port 22: No route" >&2; exit 255; }
[ "$host" != bare ] || exit 1
[ "$1" != "hostname -I" ] && [ "$1 $2" != "hostname -I" ] || { echo 127.0.0.1; exit; }
exec sh -c "$*"
"""
PDSH = """#!/usr/bin/env python3
import subprocess, sys, threading
hosts, words = sys.argv[5].split(","), sys.argv[6:]
def follow(host, process):
    for line in process.stdout:
        sys.stdout.write(f"{host}: {line}")
        sys.stdout.flush()
runs = []
for number, host in enumerate(hosts):
    line = " ".join(words).replace("%n", str(number))
    remote = {"text": True, "start_new_session": True}
    run = subprocess.Popen(["sh", "-c", line], stdout=-1, stderr=-2, **remote)
    reader = threading.Thread(target=follow, args=(host, run))
    reader.start()
    runs.append((run, reader))
for run, reader in runs:
    reader.join()
sys.exit(max(abs(run.wait()) for run, _ in runs))
"""


@pytest.fixture(autouse=True)
def _tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Path]:
    """A hostfile of two machines."""
    path = tmp_path / "hosts"
    path.write_text("one slots=1\ntwo slots=1\n", encoding="utf-8")
    return path


def test_hosts_are_looked_at_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    check_hosts(["one", "two", "two"])
    with pytest.raises(UserError, match="'down' of the hostfile can't be reached.*No route"):
        check_hosts(["one", "down"])
    with pytest.raises(UserError, match="'bare' of the hostfile has no folder"):
        check_hosts(["bare"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="needs pdsh, which is not installed"):
        check_hosts(["one"])


def test_what_other_machines_are_told() -> None:
    given = {"HF_HOME": "/hub", "HF_TOKEN": "x", "HOME": "/root", "OMP_NUM_THREADS": "3"}
    assert passed_on(given) == {"HF_HOME": "/hub", "OMP_NUM_THREADS": "3"}


def test_a_log_without_the_names_of_machines() -> None:
    text = "gpu1: Traceback\ngpu1.lab:   File\nValueError: no\n"
    assert without_names(text, ["gpu1.lab", "gpu2.lab"]) == "Traceback\n  File\nValueError: no\n"
    assert without_names(text, []) == text


HELLO = '@vramplan {"event":"hello","rank":%d,"pid":%d}'
BYE = '@vramplan {"event":"bye","rank":%d,"outcome":"x","code":%d}'
NOBODY = 2**22 + 1
"""A process id that this machine never gives out."""


def watched(tmp_path: Path, script: str) -> tuple[int, Watch]:
    watch = Watch(
        ["sh", "-c", script],
        dict(os.environ),
        tmp_path / "log.txt",
        hear=lambda event: None,
        hosts=("one", "two"),
    )
    return watch.run(), watch


def test_ranks_elsewhere_are_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vramplan_launcher.watch.GRACE", 0.2)
    hellos = f"echo '{HELLO % (0, NOBODY)}'; echo 'two: {HELLO % (1, NOBODY)}'"
    code, watch = watched(tmp_path, f"{hellos}; sleep 1; echo whole; exit 0")
    assert code == 0
    assert "whole" in watch.log.read_text()


def test_a_machine_that_fails_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank there is signalled over ssh, and only if the number is a rank's."""
    monkeypatch.setattr("vramplan_launcher.watch.GRACE", 0.3)
    import subprocess

    with (
        subprocess.Popen(["sh", "-c", f"sleep 60; : {CHILD}"], start_new_session=True) as rank,
        subprocess.Popen(["sleep", "60"]) as other,
    ):
        hellos = f"echo '{HELLO % (0, rank.pid)}'; echo '{HELLO % (1, other.pid)}'"
        failed = "echo 'pdsh@here: two: ssh exited with exit code 4'"
        began = time.monotonic()
        code, _ = watched(tmp_path, f"{hellos}; {failed}; sleep 60")
        assert code == -signal.SIGKILL
        assert time.monotonic() - began < 20
        assert rank.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="its launcher is what is run")
def test_a_run_from_a_hostfile(
    vramplan: Callable[..., Any],
    tiny: Path,
    rows: Path,
    two: Path,
    measured: Callable[[Path], dict[str, Any]],
) -> None:
    options = ("--cpu", "--batch-size", "2", "--seq-len", "32", "--hostfile", two)
    short = ("--max-steps", "4", "--save-steps", "0", "--output", "short")
    run = vramplan("launch", tiny, "--data", rows, *options, *short)
    code, _, err = run.end()
    assert code == 0, err + (run.folder / "short" / "log.txt").read_text()
    document = measured(run.folder / "short")
    assert [rank["outcome"] for rank in document["ranks"]] == ["ended", "ended"]
    assert document["recipe"]["world_size"] == 2  # the hostfile's slots
    told = (run.folder / "short" / "deepspeed.env").read_text()
    assert "DS_ACCELERATOR=cpu" in told

    long = ("--epochs", "1000", "--save-steps", "0")
    asked = vramplan("launch", tiny, "--data", rows, *options, *long, "--output", "asked")
    asked.wait_for(lambda: "step 1/" in asked.errors.read_text())
    asked.process.send_signal(signal.SIGINT)
    assert asked.end()[0] == 130
    assert list((run.folder / "asked" / "checkpoints").iterdir())
    assert asked.ranks() == []

    left = vramplan("launch", tiny, "--data", rows, *options, *long, "--output", "left")
    left.wait_for(lambda: "step 1/" in left.errors.read_text())
    left.process.kill()
    left.process.wait()
    began = time.monotonic()
    while left.ranks():
        assert time.monotonic() - began < 60
        time.sleep(0.2)
    assert list((run.folder / "left" / "checkpoints").iterdir())  # saved, though nobody listened
