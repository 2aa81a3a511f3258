"""Deep models from shallow ones: equal layers are traced a few times and counted many times.

A model of n equal layers and one of n + 1 make the same allocations in the same order, but for one
layer's more. An instant near a phase's start, or near its end, is found in both; what is live
there grows by the same bytes with every further layer, and between the first layers and the last
it changes evenly, so the most is at one of the two. Both are exact, and a test holds that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vramplan_launcher.trace.build import DEPTH_KEYS, TEXT
from vramplan_launcher.trace.counting import Event, Phase
from vramplan_launcher.trace.steps import Trace, trace

CRUMB = 4096
"""Bytes up to which an allocation's size does not tell it from another."""
MOST_EVENTS = 8000
"""Of a phase, to be aligned part by part: it takes time by their square."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Deep:
    """A trace, and the two shallower ones that it was reckoned from (both itself, if it was not).

    What `large` has more than `small` comes `times` more in the depth that was asked for.
    """

    trace: Trace
    small: Trace
    large: Trace
    times: int
    peaks: tuple[tuple[int, int], ...]
    """Of every phase, where its peak is among the events of `small` and of `large`; -1: at its
    start."""

    @property
    def layers(self) -> int | None:
        """Layers of `large`, where they are fewer than the model's."""
        return self.large.layers


def trace_deep(config: dict[str, Any], recipe: Any = None, **options: Any) -> Trace:
    """As `trace`, for models of many equal layers in the time of few; exact.

    Falls back to tracing every layer where layers differ without a period, where the model is
    shallow, or where the two shallow traces don't run alike.
    """
    if options.get("layers") is not None or options.get("watch_peak"):
        return trace(config, recipe, **options)
    return run_deep(config, recipe, **options).trace


def run_deep(config: dict[str, Any], recipe: Any = None, **options: Any) -> Deep:
    """`trace_deep` with the events that it was reckoned from."""
    settings = {**options, "keep_events": True}
    depths = _depths(config)
    if depths is None:
        return _every_layer(config, recipe, settings)
    low, high, times = depths
    small = trace(config, recipe, **{**settings, "layers": low})
    large = trace(config, recipe, **{**settings, "layers": high})
    found = _phases(small, large, times)
    if found is None:
        return _every_layer(config, recipe, settings)
    phases, peaks = found
    whole = replace(
        large,
        phases=phases,
        parameters=_line(small.parameters, large.parameters, times),
        trainable_parameters=_line(small.trainable_parameters, large.trainable_parameters, times),
        base_parameters=_line(small.base_parameters, large.base_parameters, times),
        managed=_line(small.managed, large.managed, times),
        layers=None,
    )
    return Deep(trace=whole, small=small, large=large, times=times, peaks=tuple(peaks))


def _depths(config: dict[str, Any]) -> tuple[int, int, int] | None:
    """Layers of the two shallow traces, and how often what they differ by comes on top."""
    depth, kinds = depth_of(config), period_of(config)
    if depth is None or kinds is None:
        inner = config.get(TEXT)
        return _depths(inner) if depth is None and isinstance(inner, dict) else None
    first, period = kinds
    low = first + SHALLOW * period + (depth - first) % period
    high = low + period
    if depth <= high + 2 * period:
        return None
    return low, high, (depth - high) // period


def _every_layer(config: dict[str, Any], recipe: Any, settings: dict[str, Any]) -> Deep:
    run = trace(config, recipe, **settings)
    peaks = []
    for phase in run.phases:
        events = _within(run, phase)
        high = max(range(len(events)), key=lambda i: events[i].live, default=-1)
        above = high >= 0 and events[high].live > phase.start
        peaks.append((phase.first_event + high, phase.first_event + high) if above else (-1, -1))
    return Deep(trace=run, small=run, large=run, times=0, peaks=tuple(peaks))


def _line(low: int, high: int, times: int) -> int:
    return high + times * (high - low)


def _phases(
    small: Trace, large: Trace, times: int
) -> tuple[list[Phase], list[tuple[int, int]]] | None:
    phases, peaks = [], []
    for one, two in zip(small.phases, large.phases, strict=True):
        found = _peak(_within(small, one), _within(large, two), times)
        if found is None:
            return None
        most, low, high = found
        start = _line(one.start, two.start, times)
        end = _line(one.end, two.end, times)
        inside = most > start
        peaks.append((one.first_event + low, two.first_event + high) if inside else (-1, -1))
        phases.append(Phase(two.name, start, end, max(most, start, end)))
    return phases, peaks


def _within(run: Trace, phase: Phase) -> Sequence[Event]:
    return (run.counter.events or [])[phase.first_event : phase.last_event]


def _kind(event: Event) -> Kind:
    """What makes two the same: size but for crumbs, which may grow with the depth (clipping's)."""
    size = event.delta if event.delta > CRUMB else 0
    return size, event.storage.op, event.storage.dtype


def _peak(
    small: Sequence[Event], large: Sequence[Event], times: int
) -> tuple[int, int, int] | None:
    """The extrapolated maximum and its two instants, or None where the traces don't run alike.

    Only allocations are looked at: the most is just after one, and releases that follow each other
    come in no fixed order (autocast's cache is a hash map).
    """
    born = [[i for i, event in enumerate(run) if event.delta > 0] for run in (small, large)]
    kinds = [
        [_kind(run[i]) for i in places] for run, places in zip((small, large), born, strict=True)
    ]
    pairs = _ends_alike(*kinds)
    if pairs is None:
        pairs = _parts_alike(*kinds)
    if pairs is None:
        return None
    # The most grows with the depth at least as it did last: it is the highest of straight lines.
    # So the line through the two highest instants is no bound too many, should a pair be missed.
    highest = [
        max(places, key=lambda i: run[i].live, default=-1)
        for run, places in zip((small, large), born, strict=True)
    ]
    best = (0, -1, -1)
    instants = [(born[0][one], born[1][two]) for one, two in pairs]
    if -1 not in highest:
        instants.append((highest[0], highest[1]))
    for low, high in instants:
        live = _line(small[low].live, large[high].live, times)
        if live > best[0]:
            best = (live, low, high)
    return best


Pairs = list[tuple[int, int]]
"""Numbers of the same allocation in the shallower and the deeper trace."""


Kind = tuple[int, str, str]


def _ends_alike(small: Sequence[Kind], large: Sequence[Kind]) -> Pairs | None:
    """Where the deeper trace has something more in one place."""
    count = len(small)
    ahead = 0
    while ahead < count and small[ahead] == large[ahead]:
        ahead += 1
    behind = 0
    while behind < count and small[-1 - behind] == large[-1 - behind]:
        behind += 1
    if ahead + behind < count:
        return None
    pairs = [(index, index) for index in range(ahead)]
    return pairs + [(count - index, len(large) - index) for index in range(1, behind + 1)]


def _parts_alike(small: Sequence[Kind], large: Sequence[Kind]) -> Pairs | None:
    """Where it has more in several: each norm of clipping, the layers of encoder and decoder."""
    if len(small) > MOST_EVENTS:
        return None
    from difflib import SequenceMatcher

    blocks = SequenceMatcher(None, small, large, autojunk=False).get_matching_blocks()
    pairs = [(low + i, high + i) for low, high, size in blocks for i in range(size)]
    return pairs if len(pairs) == len(small) else None
