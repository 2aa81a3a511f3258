"""Phase marks in a run's first steps, after which the probe gets out of the way.

The marks lie where the phases of an estimate end: after `Trainer.compute_loss`, after
`Trainer.training_step`, before and after the optimizer's step, after `zero_grad`. Two methods of
the trainer are wrapped for that, and unwrapped after the last marked step; nothing waits for the
device from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import TrainerCallback

from vramplan.memory.allocator import rounded
from vramplan_launcher.memory_reading import Counters, driver_says

_PHASES = {"forward": "forward", "backward": "backward", "optimizer": "optimizer_step"}


class Probe(TrainerCallback):
    """Marks `steps` optimizer steps; every step's time is taken where `timed`."""

    def __init__(self, device: int | None, *, steps: int = 3, timed: bool = False) -> None:
        self.counters = Counters(device)
        self.steps, self.timed = steps, timed
        self.done = 0
        self.phase = "start"
        """What runs now: where a run out of memory is placed."""
        self.levels: dict[str, dict[str, int | None]] = {}
        self.timeline: list[dict[str, Any]] = []
        self.step_times: list[float] = []
        self.nvml: dict[str, Any] = {}
        self.categories: dict[str, int] = {}
        self.detached = False
        self._began = 0.0
        self._release: Callable[[], None] = lambda: None
        self._optimizer: Any = None

    # --- before training ---------------------------------------------------------------------

    def begin(self) -> None:
        """Before anything is on the device."""
        self.counters.begin()
        self.nvml["context"] = driver_says(self.counters.device)
        self.phase = "load"

    def level(self, name: str, then: str) -> None:
        """What is allocated at the end of `name`, and the most since the run began."""
        self.levels[name] = {"end": self.counters.now(), "peak": self.counters.peak()}
        self.phase = then

    def attach(self, trainer: Any) -> None:
        """Wraps the trainer's two methods, on this object alone."""
        self.levels["trainer"] = {"end": self.counters.now(), "peak": self.counters.peak()}
        loss, step = trainer.compute_loss, trainer.training_step
        counters = self.counters

        def compute_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
            if not model.training:  # an evaluation
                return loss(model, *args, **kwargs)
            counters.reset()
            start = counters.now()
            self.phase = "forward"
            out = loss(model, *args, **kwargs)
            self._mark("forward", start=start)
            counters.reset()
            self.phase = "backward"
            return out

        def training_step(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            self._mark("backward")
            counters.reset()
            return out

        def release() -> None:
            del trainer.compute_loss, trainer.training_step

        trainer.compute_loss, trainer.training_step = compute_loss, training_step
        self._release = release
        self.phase = "prepare"

    # --- while training ----------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The clock starts."""
        if self.timed or not self.detached:
            self.counters.wait()
            self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Gradients are all there."""
        self.phase = "optimizer_step"
        if self.detached:
            return
        self.counters.reset()
        self.timeline.append({"phase": "pre_opt", "end": self.counters.now()})
        if self.done == self.steps - 1:
            self._count_gradients(more.get("model"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The optimizer has stepped."""
        if not self.detached:
            self._mark("optimizer")
            self.counters.reset()
        self._optimizer = more.get("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Gradients are let go; after the last marked step, the probe as well."""
        self.phase = "forward"
        if self.timed or not self.detached:
            if not self.detached:
                self._mark("step_end")
                self.counters.reset()
            else:
                self.counters.wait()
            self.step_times.append(time.perf_counter() - self._began)
        self.done += 1
        if self.done == self.steps:
            self.detach()

    def detach(self) -> None:
        """No more marks."""
        if self.detached:
            return
        self.detached = True
        self._release()
        self._count_states()
        self.nvml["marked"] = driver_says(self.counters.device)

    def _mark(self, phase: str, **more: Any) -> None:
        counters = self.counters
        if counters.here:
            mark = {"phase": phase, "end": counters.now(), "peak": counters.peak(), **more}
            self.timeline.append(mark)

    # --- what of it all is tensors that can be counted ---------------------------------------

    def _count_gradients(self, model: Any) -> None:
        if model is None:
            return
        mine = [p for p in model.parameters() if self._on_device(p)]
        kept = [*mine, *(b for b in model.buffers() if self._on_device(b))]
        if not self.counters.here:  # a GPU's allocator knows of these by itself
            kept += [t for p in mine for t in _tensors(getattr(p, "quant_state", None))]
            kept += [t for m in model.modules() for t in _tensors(getattr(m, "state", None))]
        self.categories["parameter"] = _size(kept)
        self.categories["gradient"] = _size([p.grad for p in mine if p.grad is not None])

    def _count_states(self) -> None:
        optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        if optimizer is None:
            return
        fused = any(group.get("fused") for group in getattr(optimizer, "param_groups", ()))
        kept = []
        for state in getattr(optimizer, "state", {}).values():
            for name, value in state.items() if isinstance(state, dict) else ():
                if not self._on_device(value) or getattr(value, "is_paged", False):
                    continue
                # The count of steps lies on a GPU where the step is fused, else on the host
                # (torch/optim/adam.py, _init_group); without a GPU all lies on the host.
                if name != "step" or fused or self.counters.here:
                    kept.append(value)
        self.categories["optimizer"] = _size(kept)

    def _on_device(self, value: Any) -> bool:
        """Whether it is a tensor where the run trains."""
        where = getattr(getattr(value, "device", None), "type", None)
        return where == ("cuda" if self.counters.here else "cpu")

    # --- what comes out ----------------------------------------------------------------------

    def phases(self) -> dict[str, dict[str, int | None]]:
        """End and peak by phase, of the last marked step (the states are there by then)."""
        out = {name: dict(level) for name, level in self.levels.items() if name != "trainer"}
        for mark in self.timeline:
            name = _PHASES.get(mark["phase"])
            if name is not None:
                out[name] = {"end": mark["end"], "peak": mark["peak"]}
        return out

    def peak_phase(self) -> str | None:
        """The phase with the highest mark of all."""
        marks = [(m["peak"], _PHASES[m["phase"]]) for m in self.timeline if m["phase"] in _PHASES]
        marks += [(v["peak"], k) for k, v in self.levels.items() if v["peak"] is not None]
        return max(marks, key=lambda mark: mark[0])[1] if marks else None

    def figures(self) -> dict[str, Any]:
        """All of it, for the rank's part of measurement.json. Bytes and seconds."""
        self.counters.note()
        here = self.counters.here
        self.nvml["end"] = driver_says(self.counters.device)
        return {
            "base": self.counters.base if here else None,
            "phases": self.phases() if here else {},
            "timeline": self.timeline,
            "trainer_ready": self.levels.get("trainer", {}).get("end"),
            "categories": self.categories,
            "peak_allocated": self.counters.highest if here else None,
            "peak_phase": self.peak_phase() if here else None,
            "peak_reserved": self.counters.reserved if here else None,
            "reserved": self._reserved(),
            "outside_allocator": self._outside(),
            "nvml": self.nvml,
            "step_times": self.step_times,
        }

    def _reserved(self) -> int | None:
        import torch

        return torch.cuda.memory_reserved(self.counters.device) if self.counters.here else None

    def _outside(self) -> int | None:
        """What the driver counts for this process and torch's allocator does not."""
        end = self.nvml["end"]
        used = end.get("process") or end.get("only_process")
        reserved = self._reserved()
        return used - reserved if used and reserved is not None else None


def _size(tensors: Iterable[Any]) -> int:
    """Bytes of their storages, each once, as the allocator of a GPU rounds them."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(map(rounded, storages.values()))


def _tensors(state: Any) -> Iterator[Any]:
    """Of what bitsandbytes keeps beside a weight (QuantState, MatmulLtState): its scales, and the
    scales of those."""
    for value in vars(state).values() if hasattr(state, "__dict__") else ():
        if hasattr(value, "untyped_storage"):
            yield value
        elif type(value) is type(state):
            yield from _tensors(value)
