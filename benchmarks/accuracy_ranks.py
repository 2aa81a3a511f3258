"""The accuracy page's part about several ranks: DDP and DeepSpeed, pretended and real."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from measured_ranks import RankRun, rank_runs

from vramplan.memory.estimate import Estimate
from vramplan.units import GIB, MIB

Errors = list[tuple[float, str]]
Pairs = list[tuple[RankRun, Estimate]]
TITLES = (
    ("ddp_gpu", "DDP: one rank on one NVIDIA H100, and both of two"),
    ("deepspeed_gpu", "DeepSpeed 0.19.8: one rank on one NVIDIA H100, and both of two"),
)
NOTE = """One rank of 1 to 4096 ("p8r7": of 8 ranks the one numbered 7; without r, the first). The
process group is pretended: torch's fake one returns at once, so that memory is a rank's and numbers
are not (DDP's gradients go through a communication hook that returns a finished future). "real":
every rank on a GPU of its own, through NCCL. The columns behind the peak hold other phases' peaks
and ends against the run's peak; the last, what the run had pinned of host memory."""


def sections(summary: Callable[[Errors], str]) -> tuple[list[str], Errors]:
    """Lines of the page, and the errors of all runs."""
    lines: list[str] = []
    everything: Errors = []
    for name, title in TITLES:
        pairs = [(run, run.estimate()) for run in rank_runs(name)]
        errors = [(_percent(e.peak_allocated, r.peak_allocated), r.id) for r, e in pairs]
        everything += errors
        lines += [f"## {title}\n", f"{summary(errors)} {_real(pairs)}\n", NOTE + "\n"]
        lines += [*_table(pairs), ""]
    return lines, everything


def _percent(said: int, was: int, of: int | None = None) -> float:
    return 100 * (said - was) / (of or was) + 0.0


def _real(pairs: Pairs) -> str:
    real = [(run, e) for run, e in pairs if run.real]
    worst = max((_percent(e.peak_allocated, run.peak_allocated) for run, e in real), key=abs)
    over = [_needs(run, e) for run, e in pairs]
    return (
        f"{len(real)} of them with real ranks, worst {worst:+.2f} %. CUDA context and NCCL: "
        f"estimated {min(over):+d} to {max(over):+d} MiB of what NVML showed."
    )


def _needs(run: RankRun, e: Estimate) -> int:
    """MiB of context and NCCL that are estimated beyond the measured ones."""
    assert run.overhead is not None
    said = e.overhead["context"] + (e.overhead["nccl"] if run.real else 0)
    return (said - run.overhead) // MIB


def _table(pairs: Pairs) -> Iterator[str]:
    names = ("forward", "backward", "optimizer_step")
    yield (
        "| run | measured GiB | estimate GiB | peak | initialized | forward | its end | backward "
        "| its end | step | its end | pinned GiB |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for run, e in pairs:
        found, whole = e.timeline.phases(), run.peak_allocated
        cells = [_percent(found["prepare"].end, run.phases["prepare"].end, whole)]
        for name in names:
            cells.append(_percent(found[name].peak, run.phases[name].peak, whole))
            cells.append(_percent(found[name].end, run.phases[name].end, whole))
        shown = " | ".join(f"{cell:+.2f} %" for cell in cells)
        yield (
            f"| {run.id} | {whole / GIB:.3f} | {e.peak_allocated / GIB:.3f} "
            f"| {_percent(e.peak_allocated, whole):+.2f} % | {shown} | {_host(run, e)} |"
        )


def _host(run: RankRun, e: Estimate) -> str:
    host = e.host
    if host is None or not host.pinned or run.host_pinned is None:
        return ""
    return f"{run.host_pinned / GIB:.3f} ({_percent(host.pinned, run.host_pinned):+.1f} %)"
