"""Ranks as processes: their output, their end, and that none outlives the others."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vramplan_launcher.events import heard

GRACE = 5.0
"""Seconds that ranks have to end by themselves when one of them has failed."""
_EVERY = 0.2


class Watch:
    """Starts a command, writes what it prints to a log, hears its events, ends all its ranks."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        hear: Callable[[dict[str, Any]], None],
        echo: bool = False,
    ) -> None:
        self.command, self.environment, self.log = list(command), dict(environment), log
        self.hear, self.echo = hear, echo
        self.interrupted = False
        self.ranks: dict[int, _Process] = {}
        """The ranks that live here."""
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that said goodbye."""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._failed_at: float | None = None
        self._ended_at: float | None = None
        self._training = False

    def run(self) -> int:
        """Until all have ended. Returns the command's exit code."""
        process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        before = self._listen()
        try:
            return self._until_the_end(process)
        finally:
            self._end(process)
            reader.join(timeout=GRACE)
            for number, handler in before.items():
                signal.signal(number, handler)

    def worst(self, code: int) -> int:
        """The exit code that tells most: a rank's own, where its launcher's only says "failed"."""
        return max(self.codes.values(), default=0) or code

    # --- output ------------------------------------------------------------------------------

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                if heard(line) is None:
                    log.write(line)
                    log.flush()
                self._lines.put(line)
        self._lines.put(None)

    def _until_the_end(self, process: subprocess.Popen[str]) -> int:
        while True:
            try:
                line = self._lines.get(timeout=_EVERY)
                if line is None:
                    return process.wait()
                self._take(line)
            except queue.Empty:
                if process.poll() is not None and self._silent_for(GRACE):
                    return process.wait()  # something that it left running holds its output
            except KeyboardInterrupt:
                self._ask(process)
            self._end_the_others()

    def _silent_for(self, seconds: float) -> bool:
        now = time.monotonic()
        self._ended_at = self._ended_at or now
        return now - self._ended_at > seconds

    def _take(self, line: str) -> None:
        event = heard(line)
        if event is None:
            if self.echo:
                sys.stderr.write(line)
            return
        kind, rank = event["event"], event.get("rank", 0)
        if kind == "hello":
            self.ranks[rank] = _Process(event["pid"])
        elif kind == "bye":
            self.codes[rank] = event["code"]
        elif kind == "stage":
            self._training = event["stage"] == "train"
        self.hear(event)

    # --- ends --------------------------------------------------------------------------------

    def _listen(self) -> dict[int, Any]:
        """SIGTERM (a scheduler's) is taken as Ctrl-C. Only the main thread hears signals."""
        if threading.current_thread() is not threading.main_thread():
            return {}

        def interrupt(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        return {number: signal.signal(number, interrupt) for number in (signal.SIGTERM,)}

    def _ask(self, process: subprocess.Popen[str]) -> None:
        """The first time: to save and stop. The second time: to end at once."""
        if self.interrupted or not self.ranks:
            self._end(process)
        else:
            self.hear({"event": "stopping", "saves": self._training})
            for rank in self.ranks.values():
                rank.signal(signal.SIGINT)
        self.interrupted = True

    def _end_the_others(self) -> None:
        """Ranks that wait for one that is gone would wait for long: NCCL's time-out is minutes."""
        if len(self.ranks) < 2:
            return
        gone = [number for number, rank in self.ranks.items() if not rank.alive]
        if not any(self.codes.get(number, 1) for number in (*gone, *self.codes)):
            return
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        if now - self._failed_at > GRACE:
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        for rank in self.ranks.values():
            rank.kill()

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Nothing is left running: the ranks, their launcher, and what they started."""
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        self._kill_ranks()
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


class _Process:
    """A rank's process, known by its number and when it started: numbers are given out again."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._started = _started(pid)

    @property
    def alive(self) -> bool:
        """Whether it runs still."""
        return self._started is not None and _started(self.pid) == self._started

    def signal(self, number: int) -> None:
        """Sends it a signal, if it runs."""
        if self.alive:
            with contextlib.suppress(OSError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, and its children where it leads a group."""
        if self.alive:
            _signal_group(self.pid, signal.SIGKILL)
            self.signal(signal.SIGKILL)


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()
    return None if words[0] in ("Z", "X") else words[19]


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(leader, number)
