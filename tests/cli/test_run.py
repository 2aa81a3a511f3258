"""The program `vramplan`: its exit code arrives, and nothing is lost on the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\n{before}\nfrom vramplan.cli.main import run\nrun()\n"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--version",), 0),
        (("estimate", "meta-llama/Llama-3.1-8B", "--gpu", "24GB", "--json"), 1),
        (("estimate", "meta-llama/Llama-3.1-8B", "--gpu", "0GB"), 2),
    ],
)
def test_the_exit_code_and_all_output_arrive(arguments: tuple[str, ...], code: int) -> None:
    done = run("", *arguments)
    assert done.returncode == code
    shown = done.stderr if code == 2 else done.stdout
    assert shown.endswith({0: "\n", 1: "}\n", 2: "\n"}[code])


def test_exit_handlers_run() -> None:
    done = run("import atexit; atexit.register(print, 'bye')", "--version")
    assert done.stdout.endswith("bye\n")


def test_threads_are_waited_for() -> None:
    slow = (
        "import threading, time\n"
        "def work():\n"
        "    time.sleep(0.5)\n"
        "    print('done')\n"
        "threading.Thread(target=work).start()\n"
    )
    assert run(slow, "--version").stdout.endswith("done\n")
