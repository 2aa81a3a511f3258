"""The machines of a hostfile, as DeepSpeed's launcher reaches them: over ssh. Needs no torch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

from vramplan.errors import UserError
from vramplan_launcher.command import CHILD

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
GUARD = (
    *("sh", "-c"),
    'exec 3<&0; { read _ <&3; kill -KILL 0; } >/dev/null 2>&1 & exec "$@" </dev/null 3<&-',
    "sh",
)
"""Before a command: its process group ends when its stdin closes, as a parent's death does it.

pdsh and ssh would go on, and ranks that write to them have no sign of that death.
"""
_PASSED_ON = ("HF_", "OMP_NUM_THREADS", "TORCH_", "TRANSFORMERS_", "VRAMPLAN_", "XDG_")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


def check_hosts(hosts: Sequence[str]) -> None:
    """Raises UserError for what DeepSpeed's launcher would fail at, or wait for without end."""
    lacking = next((tool for tool in ("pdsh", "ssh") if shutil.which(tool) is None), None)
    if lacking is not None:
        raise UserError(
            f"--hostfile needs {lacking}, which is not installed: DeepSpeed's launcher starts "
            f"machines with it. apt install {lacking}, or take --nnodes with --rendezvous"
        )
    here, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    names = tuple(dict.fromkeys(hosts))
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(lambda host: _on(host, f"cd {here} && test -x {python}"), names)
    for host, answer in zip(names, answers, strict=True):
        if answer.returncode == 255:  # ssh's own failures
            reason = (answer.stderr.strip().splitlines() or ["no answer"])[-1].strip()
            raise UserError(
                f"host {host!r} of the hostfile can't be reached over ssh without a password: "
                f"{reason}"
            )
        if answer.returncode:
            raise UserError(
                f"host {host!r} of the hostfile has no folder {here}, or no Python {python}: "
                "every machine sees both under the same path"
            )


def passed_on(given: Mapping[str, str]) -> dict[str, str]:
    """What the libraries of other machines are to be told; secrets stay out of commands."""
    return {
        name: value
        for name, value in given.items()
        if name.startswith(_PASSED_ON) and not _SECRET.search(name) and "\n" not in value
    }


def without_names(text: str, hosts: Sequence[str]) -> str:
    """A log's lines without the machine's name that pdsh puts before each, short or in full."""
    names = {name for host in hosts for name in (host, host.partition(".")[0])}
    if not names:
        return text
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"^(?:{known}): ?", "", text, flags=re.MULTILINE)


class RemoteRank:
    """A rank on another machine. `ended` says whether it has said goodbye."""

    def __init__(self, host: str, pid: int, ended: Callable[[], bool]) -> None:
        self.host, self.pid, self._ended = host, pid, ended
        self._killed = False

    @property
    def alive(self) -> bool:
        """Whether it runs still, as far as it can be known here."""
        return not self._ended()

    def signal(self, number: int) -> None:
        """Sends it a signal, and does not wait until it has come."""
        if self.alive:
            # Numbers are given out again: what is signalled must be a rank.
            is_rank = f"grep -qaF -- {CHILD} /proc/{self.pid}/cmdline"
            command = f"{is_rank} && kill -{number} {self.pid}"
            threading.Thread(target=_on, args=(self.host, command)).start()

    def kill(self) -> None:
        """Ends it."""
        if not self._killed:
            self._killed = True
            self.signal(SIGKILL)


def _on(host: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SSH, host, command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C on the terminal is not for it
    )
