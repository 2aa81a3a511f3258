"""The group: what it lists, how commands end, and what its output survives."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from vramplan import __version__
from vramplan.cli import main as main_module
from vramplan.cli.main import BROKEN_PIPE, BUG, COMMANDS, INTERRUPTED, main
from vramplan.errors import IllegalRecipe, VramplanError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Puts a function in the place of the command `estimate`."""

    def install(callback: Callable[[], None]) -> None:
        module = types.ModuleType("vramplan.cli.estimate")
        module.command = click.command("estimate")(callback)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vramplan.cli.estimate", module)

    return install


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: vramplan [OPTIONS] COMMAND [ARGS]...")
    for name, line in COMMANDS.items():
        assert f"  {name} " in shown
        assert line in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_is_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: vramplan {name} ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vramplan {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimat"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown command 'estimat'" in shown.err
    assert "nearest: 'estimate'" in shown.err


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--halp"]) == 2
    assert "--halp" in capsys.readouterr().err


def test_a_users_error_is_one_sentence_and_exit_2(
    fake: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def callback() -> None:
        raise IllegalRecipe("int8 with full fine-tuning")

    fake(callback)
    assert main(["estimate"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Error: int8 with full fine-tuning\n")


def test_an_errors_own_exit_code_is_used(fake: Callable[[Callable[[], None]], None]) -> None:
    class Odd(VramplanError):
        exit_code = 7

    def callback() -> None:
        raise Odd("x")

    fake(callback)
    assert main(["estimate"]) == 7


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_chooses_its_exit_code(
    fake: Callable[[Callable[[], None]], None], code: int
) -> None:
    fake(lambda: click.get_current_context().exit(code))
    assert main(["estimate"]) == code


def test_a_bug_keeps_its_traceback_and_is_no_answer(
    fake: Callable[[Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def callback() -> None:
        raise AssertionError("an invariant")

    fake(callback)
    assert main(["estimate"]) == BUG == 70
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Traceback (most recent call last):")
    assert shown.err.endswith("AssertionError: an invariant\n")


def test_interrupted(fake: Callable[[Callable[[], None]], None]) -> None:
    def callback() -> None:
        raise KeyboardInterrupt

    fake(callback)
    assert main(["estimate"]) == INTERRUPTED == 130


def test_an_output_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    main_module._never_fail_to_encode()
    print("█ 12.3 GiB", flush=True)
    assert raw.getvalue().rstrip() == b"? 12.3 GiB"


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise on Windows")
def test_a_reader_that_went_away() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "vramplan", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")
