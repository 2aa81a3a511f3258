"""docs/trace-matrix.md: kept traces (trace_matrix.py) against the estimates of this version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trace_matrix import ENDS, LAYERS, config_of, cut, recipe_of, stale, traced_optimizers

from vramplan.errors import UserError
from vramplan.memory.estimate import estimate
from vramplan.recipe.optimizers import OPTIMIZERS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trace-matrix.md"
LIMIT = 0.5
"""Percent: a cell beyond it is listed by name."""

Cell = dict[str, Any]


def pair_of(asked: Cell, traced: Cell) -> Cell:
    """A cell with both sides: every size as (estimate, trace)."""
    out = {**asked, **{k: traced[k] for k in ("refused", "failed") if k in traced}}
    if "peak" not in traced:
        return out
    config = cut(config_of(asked["model"]))
    try:
        needed = estimate(config, recipe_of(asked["fields"], config))
    except UserError as error:
        return {**out, "refused": str(error)}
    found = needed.timeline.phases()
    saved = found["forward"].end - needed.timeline.resident
    return {
        **out,
        "peak": (needed.peak_allocated, traced["peak"]),
        "saved": (saved, traced["saved"]),
        "ends": {name: (found[name].end, traced["ends"][name]) for name in ENDS},
    }


def percent(pair: Iterable[int]) -> float:
    mine, traced = pair
    return 100 * (mine - traced) / traced if traced else 0.0


def worst_of(c: Cell) -> tuple[float, str]:
    """The largest error of a cell, and where."""
    errors = [(percent(c["peak"]), "peak")]
    errors += [(percent(pair), f"end of {name}") for name, pair in c["ends"].items()]
    return max(errors, key=lambda e: abs(e[0]))


def line_of(c: Cell) -> str:
    if "peak" not in c:
        return f"{c['id']}: {c.get('refused') or c['failed']}"
    error, where = worst_of(c)
    saved = c["saved"][0] - c["saved"][1]
    return (
        f"{c['id']}: peak {percent(c['peak']):+.3f} %, worst {error:+.3f} % ({where}), "
        f"saved {saved:+d} B"
    )


def table(ran: list[Cell], key: str) -> Iterator[str]:
    heads = ("cells", "mean of peak", "worst of peak", "worst of an end", "saved, to the byte")
    yield f"| {key} | {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in sorted({c[key] for c in ran}):
        mine = [c for c in ran if c[key] == name]
        peaks = [percent(c["peak"]) for c in mine]
        ends = [percent(pair) for c in mine for pair in c["ends"].values()]
        exact = sum(c["saved"][0] == c["saved"][1] for c in mine)
        yield (
            f"| {name} | {len(mine)} | {mean(peaks):.3f} % | {most(peaks):+.3f} % "
            f"| {most(ends):+.3f} % | {exact} of {len(mine)} |"
        )


def mean(errors: list[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


def most(errors: list[float]) -> float:
    return max(errors, key=abs)


def headline(wanted: list[Cell], done: dict[str, Cell]) -> str:
    """What came out, in a sentence or two."""
    pairs = paired(wanted, done)
    ran = [c for c in pairs if "peak" in c]
    refused = sum("refused" in c for c in pairs)
    failed = sum("failed" in c for c in pairs)
    peaks = [percent(c["peak"]) for c in ran]
    worst = max(ran, key=lambda c: abs(percent(c["peak"])))
    beyond = sum(abs(worst_of(c)[0]) > LIMIT for c in ran)
    exact = sum(c["saved"][0] == c["saved"][1] for c in ran)
    return (
        f"**{len(ran)} of {len(wanted)} cells ran** (of the others, {refused} are refused by the "
        f"libraries and {failed} failed): at the peak, mean absolute error {mean(peaks):.3f} %, "
        f"signed mean {sum(peaks) / len(peaks):+.3f} %, worst {percent(worst['peak']):+.3f} % "
        f"({worst['id']}). Beyond {LIMIT} % at the peak or at a phase's end: {beyond}. What "
        f"forward saves is the same to the byte in {exact}."
    )


PAIRS: dict[str, Cell] = {}


def paired(wanted: list[Cell], done: dict[str, Cell]) -> list[Cell]:
    """Cells that have a trace, each with today's estimate."""
    for c in wanted:
        if c["id"] in done and c["id"] not in PAIRS:
            PAIRS[c["id"]] = pair_of(c, done[c["id"]])
    return [PAIRS[c["id"]] for c in wanted if c["id"] in done]


def page(wanted: list[Cell], done: dict[str, Cell]) -> str:
    from vramplan_launcher.trace import cache

    pairs = paired(wanted, done)
    ran = [c for c in pairs if "peak" in c]
    regimes = [c for c in ran if not c["regime"].startswith("optimizer")]
    beyond = sorted(
        (c for c in ran if abs(worst_of(c)[0]) > LIMIT), key=lambda c: -abs(worst_of(c)[0])
    )
    older = sum(stale(c, done[c["id"]]) for c in wanted if "peak" in done.get(c["id"], {}))
    libraries = ", ".join(f"{name} {version}" for name, version in cache.versions().items())
    lines = [
        "# Estimate against trace\n",
        "`make trace-matrix` writes this page: every family of the catalogue (its smallest",
        f"checkpoint; layers: {LAYERS}) under every regime, estimated and traced. Traced",
        f"with {libraries}. Errors are estimate against trace, of the phase's own bytes; plus is",
        "too much.\n",
        f"{headline(wanted, done)}\n",
        *([earlier(older, done)] if older else []),
        "## By regime\n",
        *table(regimes, "regime"),
        "\n## By family\n",
        *table(regimes, "family"),
        "\n## By optimizer\n",
        *table([c for c in ran if c["regime"].startswith("optimizer")], "regime"),
        f"\n## Beyond {LIMIT} %\n",
        *(f"- {line_of(c)}" for c in beyond),
        *(["None."] if not beyond else []),
        "\n## What forward saves, not to the byte\n",
        *inexact(ran),
        "\n## Not compared\n",
        *reasons([c for c in pairs if "peak" not in c]),
        untraced(),
        "",
    ]
    return "\n".join(lines)


def earlier(older: int, done: dict[str, Cell]) -> str:
    """How many cells an earlier version of the tracer made, and whether that matters."""
    both = [c["differs"] for c in done.values() if "differs" in c]
    others = sorted({name for differs in both for name in differs})
    rest = f" The others differ in {', '.join(others)}." if others else ""
    same = sum(not differs for differs in both)
    return (
        f"{older} of them were traced by an earlier version of the tracer. Of {len(both)} cells "
        f"that both versions traced, {same} came out the same to the byte.{rest}\n"
    )


OUTLIERS = (
    "gated feed-forwards under int8 keep the outlier columns of their product. How many there are "
    "is reckoned from the initialisation; the estimate keeps the fraction, the trace whole columns"
)


def inexact(ran: list[Cell]) -> Iterator[str]:
    """Cells whose saved bytes differ, by regime: how many, by how much at most, and why."""
    found: dict[str, list[Cell]] = {}
    for c in ran:
        if c["saved"][0] != c["saved"][1]:
            found.setdefault(c["regime"], []).append(c)
    for regime, mine in sorted(found.items()):
        most_bytes = max(abs(c["saved"][0] - c["saved"][1]) for c in mine)
        share = max(abs(percent(c["saved"])) for c in mine)
        families = ", ".join(sorted({c["family"] for c in mine}))
        why = OUTLIERS if regime == "int8" else "not explained"
        yield (
            f"- {regime}, {len(mine)} cells ({families}), by at most {most_bytes} bytes "
            f"({share:.4f} %): {why}."
        )
    if not found:
        yield "None."


def untraced() -> str:
    """Optimizers whose packages a trace does not run."""
    rest = [name for name in OPTIMIZERS if name not in traced_optimizers()]
    return (
        f"\nOptimizers that come with packages of their own are estimated and not traced: "
        f"{', '.join(rest)}."
    )


def reasons(without: list[Cell]) -> Iterator[str]:
    """Cells without a result, by reason."""
    grouped: dict[str, list[str]] = {}
    for c in without:
        grouped.setdefault(c.get("refused") or c["failed"], []).append(c["id"])
    for reason, ids in sorted(grouped.items()):
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        yield f"- {'; '.join(ids[:3])}{more}: {reason}"
    if not grouped:
        yield "Every cell was compared."
