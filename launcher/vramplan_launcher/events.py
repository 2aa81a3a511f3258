"""What a child tells its parent while it runs: lines of JSON among its other output."""

from __future__ import annotations

import json
import sys
from typing import Any

PREFIX = "@vramplan "


def tell(event: str, **figures: Any) -> None:
    """One line on stdout, at once."""
    line = json.dumps({"event": event, **figures}, separators=(",", ":"))
    try:
        sys.stdout.write(f"{PREFIX}{line}\n")
        sys.stdout.flush()
    except (OSError, ValueError):  # the parent is gone, and the run goes on to save
        pass


def heard(line: str) -> dict[str, Any] | None:
    """The event in a line of a child's output; None of any other line.

    Launchers put a rank's name before a line ("[default0]:"), or a carriage return.
    """
    at = line.find(PREFIX)
    if at < 0:
        return None
    try:
        event = json.loads(line[at + len(PREFIX) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
