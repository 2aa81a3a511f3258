from __future__ import annotations

import io
import os
import shlex
import sys

import pytest

from vramplan.cli.terminal import command_line, look

WORDS = ("vramplan", "estimate", "org/name", "--gpu", "RTX 4090", "--lora", "--seq-len", "512")


@pytest.mark.skipif(os.name == "nt", reason="POSIX shells")
@pytest.mark.parametrize("width", [30, 40, 60, 78])
def test_a_command_over_several_lines(width: int) -> None:
    text = command_line(WORDS, width)
    assert tuple(shlex.split(text.replace("\\\n", " "))) == WORDS
    assert all(len(line) <= width for line in text.splitlines())
    assert (len(text.splitlines()) == 1) == (width == 78)


def test_on_windows_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.cli import terminal

    fake = type("os", (), {"name": "nt"})
    monkeypatch.setattr(terminal, "os", fake)
    text = command_line(WORDS, 30)
    assert text == 'vramplan estimate org/name --gpu "RTX 4090" --lora --seq-len 512'


@pytest.mark.parametrize(
    ("columns", "width"), [("80", 80), ("200", 80), ("70", 70), ("10", 60), ("x", 80), ("", 80)]
)
def test_width(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert look().width == width


@pytest.mark.parametrize(
    ("encoding", "blocks"), [("utf-8", True), ("cp1252", False), ("ascii", False), ("cp437", False)]
)
def test_block_characters(encoding: str, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert look().blocks is blocks


def test_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in look().paint("no", "bad")
    monkeypatch.setenv("NO_COLOR", "1")
    assert look().paint("no", "bad") == "no"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert look().paint("no", "bad") == "no"
