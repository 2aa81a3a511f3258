"""Ranks as processes: their output, their end, and that none outlives the others."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vramplan_launcher.events import heard
from vramplan_launcher.hosts import GUARD, RemoteRank

GRACE = 5.0
"""Seconds that ranks have to end by themselves when one of them has failed."""
_EVERY = 0.2
_TAIL = 3000
"""Lines in which the cause of a failure is looked for."""
# pdsh 2.34, dsh.c, _rcmd_thread (ssh).
_HOST_FAILED = re.compile(r"pdsh@\S+: \S+: ssh exited with exit code")
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Watch:
    """Starts a command, writes what it prints to a log, hears its events, ends all its ranks.

    `hosts` are the ranks' machines, in the order of ranks, where ssh leads to them; empty: this
    one.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        hear: Callable[[dict[str, Any]], None],
        echo: bool = False,
        hosts: Sequence[str] = (),
    ) -> None:
        self.command, self.environment, self.log = list(command), dict(environment), log
        self.hear, self.echo, self.hosts = hear, echo, hosts
        self.interrupted = False
        self.ranks: dict[int, _Process | RemoteRank] = {}
        """The ranks that the command started."""
        self.codes: dict[int, int] = {}
        """Exit codes of the ranks that said goodbye."""
        self.tail: deque[str] = deque(maxlen=_TAIL)
        """The end of the log."""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._signals: deque[int] = deque()
        self._failed_at: float | None = None
        self._ended_at: float | None = None
        self._training = False

    def run(self) -> int:
        """Until all have ended. Returns the command's exit code."""
        process = subprocess.Popen(
            [*GUARD, *self.command] if self.hosts else self.command,
            env=self.environment,
            stdin=subprocess.PIPE if self.hosts else subprocess.DEVNULL,
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
            if process.stdin is not None:
                process.stdin.close()
            reader.join(timeout=GRACE)
            for number, handler in before.items():
                signal.signal(number, handler)

    def worst(self, code: int) -> int:
        """The exit code that tells most: a rank's own, where its launcher's only says "failed"."""
        return max(self.codes.values(), default=0) or code

    # --- output ------------------------------------------------------------------------------

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout, self.log.open("wb", buffering=0) as log:
            for line in process.stdout:
                if heard(line) is None:
                    self.tail.append(line)
                    with contextlib.suppress(OSError):  # on a full disk the run is still heard
                        log.write(line.encode())
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
            while self._signals:
                self._heed(self._signals.popleft(), process)
            self._end_the_others(process)

    def _rank(self, rank: int, pid: int) -> _Process | RemoteRank:
        if not self.hosts:
            return _Process(pid)
        return RemoteRank(self.hosts[rank], pid, lambda: rank in self.codes)

    def _silent_for(self, seconds: float) -> bool:
        now = time.monotonic()
        self._ended_at = self._ended_at or now
        return now - self._ended_at > seconds

    def _take(self, line: str) -> None:
        event = heard(line)
        if event is None:
            if self.hosts and _HOST_FAILED.match(line):
                self._fails()
            if self.echo:
                sys.stderr.write(line)
            return
        kind, rank = event["event"], event.get("rank", 0)
        if kind == "hello":
            self.ranks[rank] = self._rank(rank, event["pid"])
        elif kind == "bye":
            self.codes[rank] = event["code"]
        elif kind == "stage":
            self._training = event["stage"] == "train"
        self.hear(event)

    # --- ends --------------------------------------------------------------------------------

    def _listen(self) -> dict[int, Any]:
        """Signals are only noted, and heeded between two lines. The main thread alone hears any."""
        if threading.current_thread() is not threading.main_thread():
            return {}

        def note(number: int, frame: Any) -> None:
            self._signals.append(number)

        # What a shell starts in its background ignores Ctrl-C: so it stays.
        heeded = [n for n in _STOPPING if signal.getsignal(n) is not signal.SIG_IGN]
        return {number: signal.signal(number, note) for number in heeded}

    def _heed(self, number: int, process: subprocess.Popen[str]) -> None:
        """The first time: to save and stop. Ctrl-C a second time: to end at once.

        A scheduler sends SIGTERM to whom it finds, perhaps more than once, and SIGKILL in the end.
        """
        if not self.ranks or (self.interrupted and number == signal.SIGINT):
            self._end(process)
        elif not self.interrupted:
            self.hear({"event": "stopping", "saves": self._training})
            for rank in self.ranks.values():
                rank.signal(signal.SIGINT)
        self.interrupted = True

    def _end_the_others(self, process: subprocess.Popen[str]) -> None:
        """Ranks that wait for one that is gone would wait for long: NCCL's time-out is minutes."""
        gone = [number for number, rank in self.ranks.items() if not rank.alive]
        several = len(self.ranks) > 1
        if several and any(self.codes.get(number, 1) for number in (*gone, *self.codes)):
            self._fails()
        if self._failed_at is None:
            return
        since = time.monotonic() - self._failed_at
        if since > GRACE:
            self._kill_ranks()
        if since > 3 * GRACE:  # a machine that is down does not even hear that
            self._end(process)

    def _fails(self) -> None:
        self._failed_at = self._failed_at or time.monotonic()

    def _kill_ranks(self) -> None:
        for rank in self.ranks.values():
            rank.kill()

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Nothing is left running: the ranks, their launcher, and what they started."""
        if process.poll() is None and not self.hosts:
            # DeepSpeed's launcher would answer by ending all its kind on the hosts (pkill -f).
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
