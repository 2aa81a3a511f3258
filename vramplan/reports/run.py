"""A launched run beside its prediction: what is compared, as data, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vramplan.reports.comparison import WIDTH, _row, percent
from vramplan.reports.text import _PHASES, wrap
from vramplan.units import format_bytes

if TYPE_CHECKING:
    from vramplan.memory.estimate import Estimate

_HELD = {
    "parameter": "parameters",
    "optimizer": "optimizer states",
    "gradient": "gradients",
    "rest": "the rest, at peak",
}
_ENDS = {
    "ended": "ended",
    "interrupted": "was interrupted",
    "out_of_memory": "ran out of memory",
    "failed": "failed",
    "refused": "was refused",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One figure, predicted and measured. Bytes."""

    name: str
    predicted: int
    measured: int

    @property
    def difference(self) -> int:
        """Plus: predicted too much."""
        return self.predicted - self.measured


@dataclass(frozen=True, kw_only=True, slots=True)
class RunComparison:
    """A run and its prediction. Bytes; what was not measured is None or empty."""

    name: str
    id: str
    outcome: str
    rank: int | None
    """Of several, the rank that needed most."""
    peak: Pair | None
    phases: tuple[Pair, ...]
    """Ends and peaks by phase, named "forward, peak"."""
    categories: tuple[Pair, ...]
    predicted_peak: int | None
    required: int | None
    used: int | None
    """Allocated at the peak, and what the driver counted outside the allocator."""
    outside: int | None
    context: int | None
    """The same as predicted: CUDA context and NCCL."""
    shortage: Mapping[str, Any] | None
    """Of a run out of memory: whose, in which phase and step, how much was wanted."""
    available: int | None
    notes: tuple[str, ...]
    tokens_per_second: float | None
    step_seconds: float | None
    predicted_step_seconds: float | None

    @property
    def error(self) -> float | None:
        """Percent of the measured peak; plus: predicted too much."""
        return None if self.peak is None else percent(self.peak.predicted, self.peak.measured)

    @property
    def held(self) -> bool | None:
        """Whether the run stayed within `required`."""
        if self.required is None or self.used is None:
            return None
        return self.used <= self.required

    @property
    def largest(self) -> Pair | None:
        """Of the phases' figures, the one that differs most."""
        return max(self.phases, key=lambda pair: abs(pair.difference), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        largest = None if self.largest is None else asdict(self.largest)
        more = {"error_percent": self.error, "required_held": self.held, "largest": largest}
        return {"schema": 1, **asdict(self), **more}


def predicted(e: Estimate) -> dict[str, Any]:
    """`Estimate.to_dict()`, with what a run holds through its steps: bytes by category."""
    layout, stepping = e.parts.layout, e.parts.stepping
    held = {
        "parameter": layout.weights,
        "optimizer": stepping.states,
        "gradient": layout.gradients,
    }
    return {**e.to_dict(), "held": held}


def compare(measurement: Mapping[str, Any]) -> RunComparison:
    """Of a measurement.json: the rank that needed most beside the prediction."""
    said: Mapping[str, Any] = measurement.get("prediction") or {}
    ranks = measurement.get("ranks") or [{}]
    rank = max(ranks, key=lambda each: each.get("peak_allocated") or 0)
    measured, outside = rank.get("peak_allocated"), rank.get("outside_allocator")
    overhead = said.get("overhead") or {}
    # What ended early has not seen all phases.
    ended = measurement["outcome"] in ("ended", "interrupted")
    whole = measured and ended
    peak = None
    if whole and said:
        peak = Pair(name="peak", predicted=said["peak_allocated"], measured=measured)
    gpu, training = said.get("gpu") or {}, measurement.get("training") or {}
    return RunComparison(
        name=measurement["name"],
        id=measurement["model"]["id"],
        outcome=measurement["outcome"],
        rank=rank.get("rank") if len(ranks) > 1 else None,
        peak=peak,
        phases=tuple(_phases(said, rank)) if whole and said else (),
        categories=tuple(_categories(said, rank)) if ended and said else (),
        predicted_peak=said.get("peak_allocated"),
        required=said.get("required"),
        used=measured + outside if whole and outside is not None else None,
        outside=outside,
        context=overhead["context"] + overhead.get("nccl", 0) if overhead else None,
        shortage=rank.get("out_of_memory"),
        available=gpu.get("free") or gpu.get("capacity"),
        notes=tuple(measurement.get("notes") or ()),
        tokens_per_second=training.get("tokens_per_second"),
        step_seconds=training.get("step_seconds"),
        predicted_step_seconds=(said.get("time") or {}).get("seconds"),
    )


def as_measured(said: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The predicted phases as a run's are marked.

    Under DeepSpeed accelerate's backward steps as well (utils/deepspeed.py,
    DeepSpeedEngineWrapper.backward): both are seen as backward. Its engine and DDP's buckets are
    made after what marks can see of preparing.
    """
    phases = {name: dict(phase) for name, phase in said["phases"].items()}
    recipe = said["recipe"]
    if recipe.get("deepspeed"):
        step = phases.pop("optimizer_step")
        peak = max(phases["backward"]["peak"], step["peak"])
        phases["backward"] = {"end": step["end"], "peak": peak}
    if recipe.get("deepspeed") or recipe.get("world_size", 1) > 1:
        del phases["prepare"]
    return phases


def _phases(said: Mapping[str, Any], rank: Mapping[str, Any]) -> Iterator[Pair]:
    mine, theirs = as_measured(said), rank.get("phases") or {}
    for what in ("peak", "end"):
        for name, phase in mine.items():
            found = theirs.get(name, {}).get(what)
            if found is not None:
                yield Pair(name=f"{name}, {what}", predicted=phase[what], measured=found)


def _categories(said: Mapping[str, Any], rank: Mapping[str, Any]) -> Iterator[Pair]:
    held, counted = said.get("held") or {}, rank.get("categories") or {}
    if not held or said["recipe"].get("deepspeed"):
        return  # an engine keeps them in flat buffers of its own, at other times
    prepared = (rank.get("phases") or {}).get("prepare", {}).get("end")
    found = {name: counted.get(name) for name in ("parameter", "optimizer", "gradient")}
    if prepared is not None:  # an allocator's word before a count
        found["parameter"] = prepared
    for name, size in found.items():
        if size is not None:
            yield Pair(name=name, predicted=held[name], measured=size)
    if found["optimizer"] is None or prepared is None:
        return
    mine = said["peak_allocated"] - held["parameter"] - held["optimizer"]
    theirs = rank["peak_allocated"] - prepared - found["optimizer"]
    yield Pair(name="rest", predicted=mine, measured=theirs)


# --- as text --------------------------------------------------------------------------------


def render(c: RunComparison) -> str:
    """The whole report, at most 80 columns wide."""
    return "\n".join(_lines(c))


def _lines(c: RunComparison) -> Iterator[str]:
    who = f"{c.id} ({c.name})"
    if c.error is None:
        yield from wrap(f"{who}: {_ENDS.get(c.outcome, c.outcome)}.", WIDTH)
    else:
        rank = "" if c.rank is None else f", of rank {c.rank}"
        yield from wrap(f"{who}: predicted {c.error:+.2f} % at the peak{rank}", WIDTH)
    if c.shortage is not None:
        yield from wrap(_shortage(c), WIDTH)
    if c.peak is None and c.required is not None and c.outcome in ("ended", "interrupted"):
        yield from wrap(
            f"Predicted: {format_bytes(c.predicted_peak or 0)} at the peak, "
            f"{format_bytes(c.required)} required. The peak was not measured.",
            WIDTH,
        )
    if c.peak is not None or c.categories:
        yield ""
        yield f"  {'':<22}{'predicted':>11}{'measured':>11}{'difference':>13}"
    if c.peak is not None:
        yield _pair("peak", c.peak)
        for pair in c.phases:
            phase, _, what = pair.name.partition(", ")
            yield _pair(f"{_PHASES[phase]}, {what}", pair)
        if c.categories:
            yield ""
    for pair in c.categories:
        yield _pair(_HELD[pair.name], pair)
    if c.peak is not None or c.categories:
        yield ""
    if c.peak is not None:
        yield from _verdict(c)
    yield from _times(c)
    for note in c.notes:
        yield from wrap(f"Note: {note}.", WIDTH)


def _pair(name: str, pair: Pair) -> str:
    return _row(name, pair.predicted, pair.measured)


def _verdict(c: RunComparison) -> Iterator[str]:
    largest = c.largest
    if largest is not None and largest.difference:
        phase, _, what = largest.name.partition(", ")
        yield from wrap(
            f"The largest difference is in {_PHASES[phase]}, at its {what}: "
            f"{format_bytes(largest.difference, signed=True)}.",
            WIDTH,
        )
    if c.required is None or c.peak is None:
        return
    if c.used is None or c.outside is None:
        yield from wrap(
            f"Required: {format_bytes(c.required)}. The driver does not tell what this process "
            "had outside torch's allocator, so whether it held is not known.",
            WIDTH,
        )
        return
    word = "held" if c.held else "did not hold"
    yield from wrap(
        f"Required {word}: {format_bytes(c.required)} predicted; used were "
        f"{format_bytes(c.peak.measured)} allocated and {format_bytes(c.outside)} outside the "
        f"allocator (predicted {format_bytes(c.context or 0)}).",
        WIDTH,
    )


def _shortage(c: RunComparison) -> str:
    short = c.shortage or {}
    where = _PHASES.get(short.get("phase") or "", "preparing")
    step = f" of step {short['step']}" if short.get("step") and where != "load weights" else ""
    text = f"Out of {short.get('of', 'device')} memory in {where}{step}"
    told = {"up to {} allocated": short.get("allocated"), "{} more wanted": short.get("wanted")}
    figures = [said.format(format_bytes(size)) for said, size in told.items() if size]
    if figures:
        text += f", with {' and '.join(figures)}"
    if c.required is None:
        return f"{text}. There was no prediction."
    said = f"The prediction said {format_bytes(c.required)} required"
    if c.available is None:
        return f"{text}. {said}."
    fits = "which is less than" if c.required <= c.available else "more than"
    blame = "the prediction was wrong" if c.required <= c.available else "as predicted"
    return f"{text}. {said}, {fits} the card's {format_bytes(c.available)}: {blame}."


def _times(c: RunComparison) -> Iterator[str]:
    if c.step_seconds is None or c.tokens_per_second is None:
        return
    text = f"A step took {c.step_seconds:.3g} s: {c.tokens_per_second:,.0f} tokens/s"
    if c.predicted_step_seconds:
        off = 100 * (c.predicted_step_seconds / c.step_seconds - 1)
        text += f" (predicted {c.predicted_step_seconds:.3g} s, {off:+.0f} %)"
    yield from wrap(f"{text}.", WIDTH)
