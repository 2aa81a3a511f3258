"""What the terminal can show, and how a command is written in it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vramplan.reports.text import Look

_NARROWEST, _WIDEST = 60, 80


def look() -> Look:
    """How a report is to look on stdout."""
    from vramplan.reports.text import BLOCKS, Look, plain

    return Look(
        width=_width(),
        blocks=_can_show(BLOCKS),
        paint=_paint if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else plain,
    )


def _width() -> int:
    """Columns of the terminal, within reason. 80 where there is none."""
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (OSError, ValueError):
        return _WIDEST
    return max(_NARROWEST, min(columns or _WIDEST, _WIDEST))


def _can_show(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


_COLOURS: dict[str, dict[str, Any]] = {
    "good": {"fg": "green", "bold": True},
    "bad": {"fg": "red", "bold": True},
    "heading": {"bold": True},
    "bar": {"fg": "cyan"},
}


def _paint(text: str, role: str) -> str:
    return click.style(text, **_COLOURS[role])


def command_line(words: Sequence[str], width: int) -> str:
    """A command to paste: in POSIX shells over several lines. Windows' shells do not agree on how
    to break one, so there it is one line."""
    if os.name == "nt":
        from subprocess import list2cmdline

        return list2cmdline(words)
    from shlex import quote

    lines = [""]
    for piece in _pieces(words):
        quoted = " ".join(map(quote, piece))
        if not lines[-1]:
            lines[-1] = quoted
        elif len(lines[-1]) + len(quoted) + 3 <= width:  # a blank before it, " \\" after it
            lines[-1] += f" {quoted}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {quoted}")
    return "\n".join(lines)


def _pieces(words: Sequence[str]) -> Iterator[list[str]]:
    """Options with their values, to be kept together."""
    piece: list[str] = []
    for word in words:
        if word.startswith("--") and piece:
            yield piece
            piece = []
        piece.append(word)
    yield piece
