"""Estimate beside trace, by phase and category, and the first section in which they part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vramplan.hardware.catalogue import Gpus
from vramplan.memory.estimate import estimate
from vramplan.recipe.recipe import Recipe
from vramplan.reports.comparison import Comparison, Parting, Side
from vramplan.units import KIB
from vramplan_launcher.trace import api, parting, stretches
from vramplan_launcher.trace.stretches import Seen, Stretch

if TYPE_CHECKING:
    from vramplan_launcher.trace.scaling import Deep

TOLERANCE = 256 * KIB
"""Scalars and tables of positions, which a description leaves out, come to less."""
SHARE = 5000
"""... or a part in so many of the peak."""


def compared(
    model: Any,
    recipe: Recipe = Recipe(),  # noqa: B008
    gpu: Gpus | None = None,
    *,
    offline: bool | None = None,
) -> Comparison:
    """Estimate `model` and trace it, and find where the two part.

    Raises UserError as `estimate` and `trace_model` do.
    """
    from vramplan.models.locate import locate

    located = locate(model, offline=offline)
    needed = estimate(located.config, recipe, gpu)  # first: what it refuses costs no trace
    deep = api.run(located.config, recipe, api.capability_of(gpu))
    traced = api.traced(deep, located.id, recipe, gpu)
    tolerance = max(TOLERANCE, traced.peak_allocated // SHARE)
    return Comparison(
        id=located.id,
        recipe=recipe.to_dict(),
        estimate=_side(needed),
        trace=_side(traced),
        parting=first_parting(deep, located.config, recipe, gpu, tolerance),
        tolerance=tolerance,
    )


def _side(e: Any) -> Side:
    return Side(
        peak_allocated=e.peak_allocated,
        peak_phase=e.peak_phase,
        phases={name: (p.end, p.peak) for name, p in e.timeline.phases().items()},
        breakdown=dict(e.breakdown),
    )


def first_parting(
    deep: Deep, config: Mapping[str, Any], recipe: Recipe, gpu: Gpus | None, tolerance: int
) -> Parting | None:
    """The first section of a steady step where the two differ by more than `tolerance`.

    Of a deep model the traced, shallower one is compared with an estimate of the same depth.
    """
    from vramplan_launcher.trace.build import cut_depth

    run = deep.large
    shallow = dict(config) if run.layers is None else cut_depth(dict(config), run.layers)
    needed = estimate(shallow, recipe, gpu)
    for phase in ("forward", "backward"):
        groups = stretches.estimated(needed, phase)
        traced = stretches.traced(run, phase, [layers for layers, _ in groups])
        for (_, mine), theirs in zip(groups, traced, strict=True):
            what = _difference(mine, theirs, tolerance)
            if what:
                return parting.named(needed, phase, mine, theirs, what)
    return None


def _difference(mine: Stretch, theirs: Seen, tolerance: int) -> str:
    """In what they differ; "" where they don't."""
    if all(abs(mine.end - level) > tolerance for level in theirs.ends):
        return parting.KEEPS
    if not min(theirs.peaks) - tolerance <= mine.peak <= max(theirs.peaks) + tolerance:
        return parting.HIGHEST
    return ""
