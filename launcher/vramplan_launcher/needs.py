"""What a job needs that may not be here, found before anything heavy starts. Needs no torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from vramplan.errors import UserError
from vramplan.recipe.optimizers import INSTALLED_AS, find_optimizer
from vramplan_launcher.job import Job
from vramplan_launcher.trace.api import INSTALL, missing


def check_installed(job: Job) -> None:
    """Raises UserError, with the line that installs what the job runs."""
    lacking = list(missing(job.recipe))
    if job.recipe.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        lacking.append("deepspeed")
    if job.data is not None and importlib.util.find_spec("datasets") is None:
        lacking.append("datasets")
    reporter = job.training.report_to
    if reporter != "none" and importlib.util.find_spec(reporter) is None:
        raise UserError(f"report_to {reporter} needs its package: pip install {reporter}")
    if lacking == ["flash_attn"]:
        raise UserError(
            "attention flash_attention_2 needs the package flash-attn, which is not installed: "
            "pip install 'vramplan[flash]' --no-build-isolation, or take --attention sdpa, which "
            "needs as much memory"
        )
    optimizer = find_optimizer(job.recipe.optimizer)
    if importlib.util.find_spec(optimizer.package) is None and optimizer.package in INSTALLED_AS:
        raise UserError(
            f"optimizer {optimizer.name!r} needs {optimizer.package}, which is not installed: "
            f"pip install {INSTALLED_AS[optimizer.package]}"
        )
    if lacking:
        raise UserError(
            f"a launched run needs {' and '.join(lacking)}, which "
            f"{'is' if len(lacking) == 1 else 'are'} not installed: {INSTALL}"
        )


def check_cards(job: Job, here: int, reason: str, *, machines: int = 1) -> None:
    """Raises UserError where the job's processes have no card each.

    `here`: cards that the driver shows; `reason`: why it shows none.
    """
    if job.cpu:
        return
    if here == 0:
        if Path("/dev/kfd").exists():  # an AMD card: torch sees it, NVML does not
            return
        raise UserError(
            f"no GPU to run on. {reason} Add --cpu to run it on the processor, without memory "
            "figures; `vramplan estimate` says what it would need"
        )
    each = -(-job.processes // machines)
    if each > here:
        raise UserError(
            f"{each} processes need as many GPUs, and this machine shows {here}. Lower "
            "--world-size, or measure one rank of them with --pretend-ranks"
        )


def free_stale_locks(folder: Path | None = None) -> list[Path]:
    """Removes the locks of builds that died: DeepSpeed would wait for them without end.

    torch builds extensions under a lock file that its builder holds open
    (torch/utils/file_baton.py); one that no process holds open was left behind. Linux only.
    """
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return []
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = folder or Path(given or Path.home() / ".cache" / "torch_extensions")
    gone = []
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        if not any(_holds(process, lock) for process in processes.glob("[0-9]*")):
            lock.unlink(missing_ok=True)
            gone.append(lock)
    return gone


def _holds(process: Path, file: Path) -> bool:
    """Whether a process has the file open; of other users' processes that is not told."""
    try:
        return any(os.readlink(fd) == str(file.resolve()) for fd in (process / "fd").iterdir())
    except OSError:
        return False


def group_of_one(job: Job) -> dict[str, str]:
    """What a single process needs to be told to make a process group: a port, rank 0 of 1.

    DeepSpeed reads them all (0.19.8, comm/comm.py, init_distributed). On the processor accelerate
    takes the same port for every run (1.15, state.py, PartialState): two at a time would collide.
    """
    zero = job.recipe.deepspeed is not None and not job.pretend_ranks
    if job.processes > 1 or not (job.cpu or zero):
        return {}
    given = os.environ
    made = {
        "MASTER_ADDR": given.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": given.get("MASTER_PORT") or str(free_port()),
    }
    if zero:
        made |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return made


def free_port() -> int:
    """A port of this machine that nobody has now."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
