"""Deep models from shallow ones: equal layers are traced a few times and counted many times.

A model of n equal layers and one of n + 1 make the same allocations in the same order, but for one
layer's more. An instant near a phase's start, or near its end, is found in both; what is live
there grows by the same bytes with every further layer, and between the first layers and the last
it changes evenly, so the most is at one of the two. Both are exact, and a test holds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vramplan_launcher.trace.build import DEPTH_KEYS
from vramplan_launcher.trace.counting import Event, Phase
from vramplan_launcher.trace.steps import Trace, trace

SHALLOW = 4
"""Layers of the shallower trace: two at each end, the inner one of which stands for all between."""


def depth_of(config: dict[str, Any]) -> int | None:
    """The number of layers, where the config names it."""
    for key in DEPTH_KEYS:
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def period_of(config: dict[str, Any]) -> tuple[int, int] | None:
    """(layers unlike the rest at the start, after how many layers the kinds repeat), or None."""
    depth = depth_of(config)
    first = config.get("first_k_dense_replace") or 0
    kinds = config.get("layer_types")
    if depth is None or not isinstance(first, int):
        return None
    if kinds is None:
        for key in ("sliding_window_pattern", "full_attention_interval", "decoder_sparse_step"):
            if isinstance(config.get(key), int) and config[key] > 1:
                return first, config[key]
        return first, 1
    for period in range(1, depth // 2 + 1):
        if all(kinds[i] == kinds[i % period] for i in range(depth)):
            return first, period
    return None


def trace_deep(config: dict[str, Any], recipe: Any = None, **options: Any) -> Trace:
    """As `trace`, for models of many equal layers in the time of few; exact.

    Falls back to tracing every layer where layers differ without a period, where the model is
    shallow, or where the two shallow traces don't run alike.
    """
    depth, kinds = depth_of(config), period_of(config)
    plain = options.get("layers") is not None or options.get("watch_peak")
    if depth is None or kinds is None or plain:
        return trace(config, recipe, **options)
    first, period = kinds
    low = first + SHALLOW * period + (depth - first) % period
    high = low + period
    if depth <= high + 2 * period:
        return trace(config, recipe, **options)
    settings = {**options, "keep_events": True}
    small = trace(config, recipe, **{**settings, "layers": low})
    large = trace(config, recipe, **{**settings, "layers": high})
    times = (depth - high) // period
    phases = _phases(small, large, times)
    if phases is None:
        return trace(config, recipe, **options)
    return replace(
        large,
        phases=phases,
        parameters=_line(small.parameters, large.parameters, times),
        trainable_parameters=_line(small.trainable_parameters, large.trainable_parameters, times),
    )


def _line(low: int, high: int, times: int) -> int:
    return high + times * (high - low)


def _phases(small: Trace, large: Trace, times: int) -> list[Phase] | None:
    out = []
    for one, two in zip(small.phases, large.phases, strict=True):
        peak = _peak(_within(small, one), _within(large, two), times)
        if peak is None:
            return None
        start = _line(one.start, two.start, times)
        end = _line(one.end, two.end, times)
        out.append(Phase(two.name, start, end, max(peak, start, end)))
    return out


def _within(run: Trace, phase: Phase) -> Sequence[Event]:
    return (run.counter.events or [])[phase.first_event : phase.last_event]


def _kind(event: Event) -> tuple[bool, str, str]:
    return event.delta > 0, event.storage.op, event.storage.dtype


def _peak(small: Sequence[Event], large: Sequence[Event], times: int) -> int | None:
    """The extrapolated maximum, or None where the traces don't run alike."""
    count = len(small)
    ahead = 0
    while ahead < count and _kind(small[ahead]) == _kind(large[ahead]):
        ahead += 1
    behind = 0
    while behind < count and _kind(small[-1 - behind]) == _kind(large[-1 - behind]):
        behind += 1
    if ahead + behind < count:
        return None
    most = 0
    for index in range(ahead):
        most = max(most, _line(small[index].live, large[index].live, times))
    for index in range(1, behind + 1):
        most = max(most, _line(small[-index].live, large[-index].live, times))
    return most
