"""Every term of an estimate's peak, with its formula and its figures; they add up to it exactly.

What stays (weights, states, workspaces, inputs) is listed by group of parameters (terms.py). What
comes and goes is found by recording the step once more, every storage labelled with where it was
made, and reading off what lives at the instant that the estimate found highest (live.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vramplan.memory import allocator
from vramplan.memory.estimate import Estimate
from vramplan.memory.labels import labelled_step
from vramplan.memory.live import live_terms
from vramplan.memory.program import Point
from vramplan.memory.terms import Term, gradients, loading, resident, step_transient
from vramplan.memory.zero_terms import zero_terms
from vramplan.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The peak of an estimate, term by term; sizes in bytes."""

    id: str
    batch: int
    seq: int
    phase: str
    where: str
    """The stretch of the phase in which the peak falls: a layer, the head, ..."""
    terms: tuple[Term, ...]
    """They add up to `peak_allocated`."""
    overhead: tuple[Term, ...]
    """What `required` adds."""
    peak_allocated: int
    required: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": 1, **asdict(self)}


def explain(estimate: Estimate) -> Explanation:
    """Every term of `estimate.peak_allocated`, the largest of a category first."""
    phase, where = estimate.peak_phase, ""
    if estimate.sharded is not None:
        terms = list(zero_terms(estimate, estimate.sharded))
    elif phase in ("load", "prepare"):
        terms = list(loading(estimate))
    else:
        terms = list(resident(estimate))
        if phase == "optimizer_step":
            terms += gradients(estimate, "gradients of the step")
            terms += step_transient(estimate)
        else:
            where, live = _at_peak(estimate)
            terms += live
    terms = [t for t in terms if t.bytes]
    found = sum(t.bytes for t in terms)
    assert found == estimate.peak_allocated, (found, estimate.peak_allocated, phase)
    totals: Counter[str] = Counter()
    for t in terms:
        totals[t.category] += t.bytes
    terms.sort(key=lambda t: (-totals[t.category], t.category, -t.bytes))
    return Explanation(
        id=estimate.id,
        batch=estimate.recipe.batch_size,
        seq=estimate.recipe.seq_len,
        phase=phase,
        where=where,
        terms=tuple(terms),
        overhead=tuple(_overhead(estimate)),
        peak_allocated=estimate.peak_allocated,
        required=estimate.required,
    )


def _at_peak(e: Estimate) -> tuple[str, list[Term]]:
    """Where in forward or backward the peak is, and what lives there."""
    batch, seq = e.recipe.batch_size, e.recipe.seq_len
    index, point = _highest(list(e.timeline.points), e.peak_phase)
    held = e.timeline.held_gradients
    terms = list(gradients(e, "earlier micro-batches")) if held else []
    labelled, layers = labelled_step(e.architecture, e.policy), e.architecture.layers
    terms += live_terms(labelled, e.parts.program, index, point, layers, batch, seq)
    return point.section.name, terms


def _highest(points: list[Point], phase: str) -> tuple[int, Point]:
    mine = [(i, p) for i, p in enumerate(points) if p.section.phase == phase]
    return max(mine, key=lambda pair: pair[1].peak)


def _overhead(e: Estimate) -> Iterator[Term]:
    percent = allocator.SLACK_PERCENT[e.recipe.allocator]
    rows = {
        "context": (
            "CUDA context, kernels and libraries",
            "measured",
            "NVML's figure less what torch had reserved, a training process",
        ),
        "nccl": (
            "NCCL's communicators",
            "measured",
            "NVML's figure of two ranks on NVIDIA H100, less that of a pretended group's",
        ),
        "allocator_slack": (
            "what the allocator needs beyond the peak",
            f"{percent} % of the peak + {format_bytes(allocator.FRAGMENTS)}"
            + (" + the step's largest temporary" if e.parts.stepping.largest else ""),
            "runs under a capped allocator; see memory/allocator.py",
        ),
    }
    for name, size in e.overhead.items():
        what, formula, source = rows.get(name, (name, "", ""))
        if size:
            yield Term(
                category=name,
                what=what,
                formula=formula,
                figures=f"{size} B",
                bytes=size,
                source=source,
            )
