"""measurement.json: what a run measured, by rank, beside what was predicted. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vramplan.units import format_bytes
from vramplan_launcher.files import read_json, write_json
from vramplan_launcher.job import JOB, Job, read_job

MEASUREMENT = "measurement.json"
RANKS = "ranks"
_WORST_FIRST = ("out_of_memory", "refused", "failed", "interrupted", "ended")
_OF_THE_MODEL = ("trainable_parameters",)
_OF_TRAINING = (
    "steps",
    "of_steps",
    "loss",
    "losses",
    "seconds_between_steps",
    "train_seconds",
    "load_seconds",
    "saved",
)


def reports(folder: Path) -> list[dict[str, Any]]:
    """What the ranks wrote, in their order. One that was killed wrote nothing."""
    found = [read_json(path, "a rank's report") for path in (folder / RANKS).glob("rank*.json")]
    return sorted(found, key=lambda report: int(report["rank"]))


def outcome_of(ranks: Sequence[Mapping[str, Any]], expected: int) -> str:
    """The worst of the ranks' ends; a rank without a report has failed."""
    ends = {str(rank["outcome"]) for rank in ranks}
    if len(ranks) < expected:
        ends.add("failed")
    return next(name for name in _WORST_FIRST if name in ends)


def assemble(
    job: Job,
    beside: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    *,
    name: str,
    expected: int,
    seconds: float,
    failure: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document: schema 1. Bytes and seconds."""
    first: Mapping[str, Any] = ranks[0] if ranks else {}
    prediction = dict(beside.get("prediction") or {})
    training = {key: first[key] for key in _OF_TRAINING if key in first}
    training |= _speed(job, first)
    common = (*_OF_THE_MODEL, *_OF_TRAINING, "environment")
    return {
        "schema": 1,
        "name": name,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "outcome": outcome_of(ranks, expected),
        "failure": failure,
        "model": {
            **prediction.get("model", {"id": job.model}),
            "random_weights": job.random_weights,
            "trainable_parameters": first.get("trainable_parameters"),
        },
        "recipe": job.recipe.to_dict(),
        "job": job.to_dict(),
        "prediction": prediction,
        "environment": first.get("environment", {}),
        "ranks": [{k: v for k, v in rank.items() if k not in common} for rank in ranks],
        "training": training,
        "seconds": seconds,
        "notes": notes_of(job) + _company(first),
    }


def _speed(job: Job, first: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step and tokens a second: the median, without the steps that were marked.

    A run that measures waits for the device around each step; in training, what is between two
    steps counts as well.
    """
    between = first.get("seconds_between_steps") or first.get("step_times") or ()
    taken = between if job.trains else first.get("step_times", ())
    times = sorted(taken[job.marked_steps :] or taken[1:])
    if not times or job.pretend_ranks:
        return {}
    middle = times[len(times) // 2]
    recipe = job.recipe
    tokens = recipe.batch_size * recipe.seq_len * recipe.gradient_accumulation_steps
    return {
        "step_seconds": middle,
        "tokens_per_second": tokens * recipe.world_size / middle,
    }


def notes_of(job: Job) -> list[str]:
    """What must be known to read the figures."""
    notes = []
    if job.pretend_ranks:
        notes.append(
            f"rank 0 of {job.pretend_ranks} pretended ranks: its memory is real, nothing was "
            "trained, times mean nothing, and NCCL's own buffers are missing"
        )
    if job.random_weights:
        notes.append("random weights")
    if job.cpu:
        notes.append(
            "on the processor: there are no GPU memory figures; what a run holds is counted by "
            "tensor, rounded as a GPU's allocator does"
        )
    if job.emulate is not None:
        what = "the process's data" if job.cpu else "the allocator"
        notes.append(f"{what} was capped as on a card of {format_bytes(job.emulate)}")
    return notes


_COMPANY = 2**30
"""Bytes that others hold on a card from which on it is said: a desktop has less."""


def _company(first: Mapping[str, Any]) -> list[str]:
    """Whether other processes were on the card: then times say little."""
    said = (first.get("nvml") or {}).get("end") or {}
    if not said.get("process") or said["device_used"] - said["process"] < _COMPANY:
        return []
    return ["other processes were on the card, and may have slowed the steps"]


def write_measurement(folder: Path, document: Mapping[str, Any]) -> Path:
    """Whole or not at all."""
    return write_json(folder / MEASUREMENT, document)


def read_measurement(path: Path) -> dict[str, Any]:
    """Of a run's folder or of the file itself. Raises UserError."""
    return read_json(path / MEASUREMENT if path.is_dir() else path, "measurement")


def measurement_of(path: Path) -> dict[str, Any]:
    """As `read_measurement`; of a run whose parent is gone, or never was, put together anew.

    Raises UserError where there is neither a measurement nor a job with a rank's report.
    """
    if not path.is_dir() or (path / MEASUREMENT).exists() or not reports(path):
        return read_measurement(path)
    job, beside = read_job(path / JOB)
    ranks = reports(path)
    seconds = max(float(rank["seconds"]) for rank in ranks)
    return assemble(
        job, beside, ranks, name=path.resolve().name, expected=job.processes, seconds=seconds
    )
