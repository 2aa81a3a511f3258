"""Many runs' errors summed up: by card and method, each class with its worst and signed mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vramplan.reports.comparison import WIDTH
from vramplan.reports.run import RunComparison, compare
from vramplan.reports.text import wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Class:
    """Runs of one card and method. Errors are percent of the measured peak; plus: too much."""

    card: str
    method: str
    runs: int
    mean_absolute: float
    worst: float
    signed_mean: float
    required_held: int
    """Of the runs whose memory outside the allocator is known, how many stayed in `required`."""
    required_known: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All classes, and what could not be counted."""

    classes: tuple[Class, ...]
    compared: int
    unmeasured: int
    """Runs without memory figures (on the processor), or without a prediction."""
    failed: int
    out_of_memory: int
    out_of_memory_predicted_to_fit: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"schema": 1, **asdict(self)}


def summarise(runs: Sequence[Mapping[str, Any]]) -> Summary:
    """Of measurement documents."""
    groups: dict[tuple[str, str], list[RunComparison]] = {}
    unmeasured = failed = short = wrong = 0
    for run in runs:
        if run["outcome"] == "out_of_memory":
            short += 1
            wrong += (run.get("prediction") or {}).get("fits") is True
            continue
        if run["outcome"] not in ("ended", "interrupted"):
            failed += 1
            continue
        found = compare(run)
        if found.error is None:
            unmeasured += 1
            continue
        card = str(run["environment"].get("device") or "?")
        groups.setdefault((card, method_of(run["recipe"])), []).append(found)
    classes = tuple(_class(*key, groups[key]) for key in sorted(groups))
    return Summary(
        classes=classes,
        compared=sum(each.runs for each in classes),
        unmeasured=unmeasured,
        failed=failed,
        out_of_memory=short,
        out_of_memory_predicted_to_fit=wrong,
    )


def method_of(recipe: Mapping[str, Any]) -> str:
    """ "full", "LoRA", "QLoRA", "int8 LoRA", with the ZeRO stage."""
    name = "full" if recipe.get("lora") is None else "LoRA"
    quantization = recipe.get("quantization")
    if quantization is not None:
        name = "int8 LoRA" if quantization == "int8" else "QLoRA"
    zero = recipe.get("deepspeed")
    return name if zero is None else f"{name}, ZeRO {zero['stage']}"


def _class(card: str, method: str, runs: Sequence[RunComparison]) -> Class:
    errors = [run.error for run in runs if run.error is not None]
    held = [run.held for run in runs if run.held is not None]
    return Class(
        card=card,
        method=method,
        runs=len(runs),
        mean_absolute=sum(map(abs, errors)) / len(errors),
        worst=max(errors, key=abs),
        signed_mean=sum(errors) / len(errors),
        required_held=sum(held),
        required_known=len(held),
    )


def render(summary: Summary, folder: str) -> str:
    """The table, at most 80 columns wide."""
    return "\n".join(_lines(summary, folder))


def _lines(summary: Summary, folder: str) -> Iterator[str]:
    total = summary.compared + summary.unmeasured + summary.out_of_memory + summary.failed
    if not total:
        yield from wrap(
            f"No runs yet in {folder}: `vramplan verify MODEL` makes a short one.", WIDTH
        )
        return
    yield f"Runs in {folder}: {total}"
    card = None
    for each in summary.classes:
        if each.card != card:
            card = each.card
            yield ""
            yield f"{card[:24]:<26}{'runs':>5}{'mean |error|':>14}{'worst':>9}{'signed':>9}" + (
                f"{'required held':>15}"
            )
        yield (
            f"  {each.method:<24}{each.runs:>5}{each.mean_absolute:>12.2f} %{each.worst:>+7.2f} %"
            f"{each.signed_mean:>+7.2f} %{f'{each.required_held} of {each.required_known}':>15}"
        )
    yield ""
    if summary.out_of_memory:
        yield from wrap(
            f"{summary.out_of_memory} ran out of memory, of which "
            f"{summary.out_of_memory_predicted_to_fit} were predicted to fit.",
            WIDTH,
        )
    if summary.failed:
        yield f"{summary.failed} failed."
    if summary.unmeasured:
        yield from wrap(
            f"{summary.unmeasured} have no memory figures (on the processor), or no prediction.",
            WIDTH,
        )
