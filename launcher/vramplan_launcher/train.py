"""The child: `python -m vramplan_launcher.train JOB`, one process a rank.

It runs the job, and writes ranks/rank<N>.json beside it: how it ended, and what was measured.
Exit codes: 0 ended, or stopped when asked; 2 the input is wrong; 3 out of memory; 4 anything else.
"""

from __future__ import annotations

import io
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from vramplan.errors import UserError
from vramplan_launcher.events import tell
from vramplan_launcher.files import write_json
from vramplan_launcher.job import read_job

OUT_OF_MEMORY = 3
FAILED = 4
_HOST = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
_DEVICE = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_WANTED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?([KMGT]i?B|bytes)")


def main(arguments: list[str]) -> int:
    """One rank of the job in the file that is named. Returns the exit code."""
    end_with_parent()
    path = Path(arguments[-1]).resolve()
    rank = int(os.environ.get("RANK", "0"))
    tell("hello", rank=rank, pid=os.getpid())
    code, report = _run(path, rank)
    try:
        write_json(rank_file(path.parent, rank), report)
    except UserError as error:  # a full disk: what ended the run stands in the log
        print(error)
    tell("bye", rank=rank, outcome=report["outcome"], code=code)
    return code


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's report is."""
    return folder / "ranks" / f"rank{rank}.json"


def _run(path: Path, rank: int) -> tuple[int, dict[str, Any]]:
    report: dict[str, Any] = {"rank": rank, "outcome": "failed"}
    session: Any = None
    began = time.time()
    try:
        job, _ = read_job(path)
        from vramplan_launcher.callbacks import Stop
        from vramplan_launcher.environment import environment
        from vramplan_launcher.session import Session

        alone = job.processes == 1
        stop = Stop(saves=job.trains, alone=alone)
        stop.listen()
        session = Session(job, path.parent, stop)
        report["environment"] = environment(session.device)
        session.train(session.prepare())
        report["outcome"] = "interrupted" if stop.stopped else "ended"
        code = 0
    except KeyboardInterrupt:
        report["outcome"], code = "interrupted", 0
    except UserError as error:
        report |= {"outcome": "refused", "error": str(error)}
        code = UserError.exit_code
    except BaseException as error:
        traceback.print_exc()
        code = _blame(error, report, session)
    if session is not None:
        report |= {**session.facts, **session.probe.figures()}
    report["seconds"] = time.time() - began
    return code, report


def _blame(error: BaseException, report: dict[str, Any], session: Any) -> int:
    text = f"{type(error).__name__}: {error}"
    where = shortage(error, capped=session is not None and session.job.emulate is not None)
    report["error"] = text[:2000]
    if where is None:
        return FAILED
    report["outcome"] = "out_of_memory"
    probe = None if session is None else session.probe
    report["out_of_memory"] = {
        "of": where,
        "phase": None if probe is None else probe.phase,
        "step": None if probe is None else probe.done + 1,
        "allocated": None if probe is None else probe.counters.peak(),
        "wanted": wanted(text),
    }
    return OUT_OF_MEMORY


def shortage(error: BaseException, *, capped: bool = False) -> str | None:
    """Whose memory ran out, "device" or "host"; None of any other error.

    Under a cap on the host's memory oneDNN says of a failed allocation only that it could not
    create a primitive.
    """
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _DEVICE):
        return "device"
    signs = (*_HOST, "could not create a primitive") if capped else _HOST
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return "host"
    return None


def wanted(text: str) -> int | None:
    """The bytes of the allocation that failed, as torch's message tells them."""
    found = _WANTED.search(text)
    if found is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return round(float(found[1]) * units.get(found[2][0], 1))


def end_with_parent() -> None:
    """When nobody reads its output any more, this process is asked to stop: no orphans.

    The parent's death closes the pipe, whatever is between: a launcher, or ssh.
    """

    def wait() -> None:
        broken = select.poll()
        broken.register(1, 0)  # errors and hang-ups alone
        broken.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    sys.stdout, sys.stderr = _unheard(1), _unheard(2)
    threading.Thread(target=wait, daemon=True).start()


class _Unheard(io.FileIO):
    """A pipe that nobody need read: what is printed while a run saves must not fail."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _unheard(number: int) -> io.TextIOWrapper:
    pipe = io.BufferedWriter(_Unheard(number, "w", closefd=False))
    return io.TextIOWrapper(pipe, "utf-8", "backslashreplace", line_buffering=True)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        os._exit(exit_code)  # other ranks may wait in a collective: leave without them
    sys.exit(0)
