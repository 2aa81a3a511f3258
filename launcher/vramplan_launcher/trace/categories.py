"""What is live at an instant of a trace, in the categories of an estimate."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass, field

from vramplan_launcher.trace.counting import Phase, Storage
from vramplan_launcher.trace.scaling import Deep
from vramplan_launcher.trace.steps import Trace


@dataclass
class Lives:
    """When every storage of a trace was born and freed, by place in its events."""

    run: Trace
    born: dict[int, int] = field(default_factory=dict)
    freed: dict[int, int] = field(default_factory=dict)
    storages: dict[int, Storage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place, event in enumerate(self.run.counter.events or []):
            key = id(event.storage)
            self.storages[key] = event.storage
            (self.born if event.delta > 0 else self.freed)[key] = place
        self._ends = {phase.name: phase.last_event for phase in self.run.phases}
        self._heads = {p.name: self._head(p) for p in self.run.phases if p.name.endswith("forward")}

    def _head(self, phase: Phase) -> int:
        """Where a forward's last stage begins: behind the last layer, the head runs."""
        events = self.run.counter.events or []
        for place in range(phase.first_event, phase.last_event):
            if events[place].delta > 0 and events[place].storage.module == self.run.head:
                return place
        return phase.last_event

    def category(self, key: int) -> str:
        """In the words of an estimate.

        What outlives the phase that made it stays (weights, gradients, states); what does not is
        temporary, but for activations.
        """
        storage = self.storages[key]
        made = storage.category
        stays = self.freed.get(key, len(self.run.counter.events or [])) >= self._end(storage)
        if made in ("parameter", "gradient", "optimizer"):
            return made if stays else "temporary"
        if made == "activation":
            if storage.phase.endswith("forward"):
                late = self.born[key] >= self._heads.get(storage.phase, self.born[key] + 1)
                return "logits" if late else "activation"
            if storage.phase.endswith("clip"):
                return "temporary"
        return made

    def _end(self, storage: Storage) -> int:
        """Where the phase ends in which a storage was born."""
        return self._ends.get(storage.phase, 0)

    def live_at(self, place: int) -> dict[str, int]:
        """Bytes by category just after event `place`."""
        out: Tally[str] = Tally()
        for key, born in self.born.items():
            if born <= place < self.freed.get(key, place + 1):
                out[self.category(key)] += self.storages[key].size
        return dict(out)


def live_by_category(deep: Deep, phase: int) -> dict[str, int]:
    """Bytes by category at the peak of phase number `phase`, at the full depth."""
    low, high = deep.peaks[phase]
    if low < 0:  # at its start
        low = deep.small.phases[phase].first_event - 1
        high = deep.large.phases[phase].first_event - 1
    large = Lives(deep.large).live_at(high)
    if not deep.times:
        return large
    small = Lives(deep.small).live_at(low)
    return {
        name: large.get(name, 0) + deep.times * (large.get(name, 0) - small.get(name, 0))
        for name in {*small, *large}
    }
