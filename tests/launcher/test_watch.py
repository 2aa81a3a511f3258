"""A command is watched: its output, and what its parent is told by signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from vramplan_launcher.files import write_text
from vramplan_launcher.watch import Watch

from vramplan.errors import UserError

if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)

RANK = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print('@vramplan {"event":"hello","rank":0,"pid":%d}' % os.getpid(), flush=True)
while not asked:
    time.sleep(0.05)
time.sleep(1)
print("saved", len(asked), flush=True)
"""


def watch(log: Path, *command: str) -> Watch:
    return Watch(command, dict(os.environ), log, hear=lambda event: None)


def signalled(watched: Watch, *numbers: int) -> int:
    """Sends signals to this process once a rank is there, half a second between two."""

    def send() -> None:
        while not watched.ranks:
            time.sleep(0.05)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    thread.start()
    code = watched.run()
    thread.join()
    return code


@pytest.mark.parametrize(
    ("numbers", "saves"),
    [
        ((signal.SIGINT,), True),
        ((signal.SIGTERM, signal.SIGTERM), True),  # a scheduler's, to whom it finds
        ((signal.SIGTERM, signal.SIGINT), False),
        ((signal.SIGINT, signal.SIGINT), False),
    ],
)
def test_a_second_ctrl_c_ends_at_once(
    tmp_path: Path, numbers: tuple[int, ...], saves: bool
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        watched = watch(tmp_path / "log.txt", sys.executable, "-c", RANK)
        code = signalled(watched, *numbers)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert watched.interrupted
    assert (code == 0, "saved 1" in (tmp_path / "log.txt").read_text()) == (saves, saves)


def test_a_full_disk_does_not_stop_the_listening() -> None:
    watched = watch(Path("/dev/full"), "sh", "-c", "echo a; echo 'No space left'; exit 4")
    assert watched.run() == 4
    assert list(watched.tail) == ["a\n", "No space left\n"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write '.*/file/job.json': "):
        write_text(tmp_path / "file" / "job.json", "{}")
