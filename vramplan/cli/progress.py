"""A launched run on the terminal: what it does, and a line of progress that is written over."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from vramplan.units import format_bytes

_STAGES = {
    "random weights": "Making random weights ...",
    "data": "Reading data ...",
    "load": "Loading the model ...",
    "train": "Training ...",
}
_SELDOM = 15.0
"""Seconds between two lines of progress where lines can't be written over."""


class Screen:
    """Hears a run's events. `predicted`: bytes at the peak, None where nothing was predicted."""

    def __init__(self, predicted: int | None = None, stream: TextIO | None = None) -> None:
        self.predicted = predicted
        self.stream = stream or sys.stderr
        self.overwrites = self.stream.isatty()
        self._shown = self._length = 0
        self._said: set[str] = set()
        self._last = -_SELDOM
        self._evaluated: float | None = None

    def hear(self, event: dict[str, Any]) -> None:
        """One event of `vramplan_launcher.events`."""
        kind = event["event"]
        if kind == "stage" and event.get("rank", 0) == 0:
            self.say(_STAGES.get(event["stage"], ""), once=True)
        elif kind == "note":
            self.say(event["text"])
        elif kind == "step":
            self._progress(event)
        elif kind == "evaluated":
            self._evaluated = event["loss"]
            self.say(f"Evaluation after step {event['step']}: loss {event['loss']:.4g}")
        elif kind == "saved":
            self.say(f"Checkpoint saved after step {event['step']}.")
        elif kind == "stopping":
            what = "Saving, then stopping" if event["saves"] else "Stopping"
            self.say(f"{what}; once more Ctrl-C ends it at once.")

    def say(self, text: str, *, once: bool = False) -> None:
        """A line of its own."""
        if not text or (once and text in self._said):
            return
        self._said.add(text)
        self.clear()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Takes the line of progress back."""
        if self._length:
            self.stream.write(f"\r{' ' * self._length}\r")
            self._length = 0

    def _progress(self, event: dict[str, Any]) -> None:
        text = line_of(event, self.predicted)
        if self.overwrites:
            self.clear()
            self.stream.write(text)
            self._length = len(text)
        else:
            now = time.monotonic()
            if now - self._last < _SELDOM and event["step"] != event["of"]:
                return
            self._last = now
            self.stream.write(f"{text}\n")
        self.stream.flush()


def line_of(event: dict[str, Any], predicted: int | None) -> str:
    """ "step 12/100  loss 1.83  4,096 tokens/s  10.1 GiB of 10.2 predicted  3 min left"."""
    parts = [f"step {event['step']}/{event['of']}"]
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.4g}")
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("peak"):
        text = format_bytes(event["peak"])
        parts.append(f"{text} of {format_bytes(predicted)} predicted" if predicted else text)
    left = event.get("seconds_left")
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
