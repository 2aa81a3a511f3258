"""The probe's marks on a trainer of a few lines, whose memory is a number."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.callbacks import Progress, Stop
from vramplan_launcher.memory_reading import Counters
from vramplan_launcher.probe import Probe


class Memory(Counters):
    """Counters that read `live`, and take its highest since the last reset."""

    def __init__(self) -> None:
        super().__init__(0)
        self.live = self.top = 0

    def take(self, size: int) -> None:
        self.live += size
        self.top = max(self.top, self.live)

    def begin(self) -> None:
        self.reset()

    def now(self) -> int:
        return self.live

    def peak(self) -> int:
        return self.top

    def reset(self) -> None:
        self.highest = max(self.highest, self.top)
        self.top = self.live

    def note(self) -> None:
        self.highest = max(self.highest, self.top)

    def wait(self) -> None: ...


class Model:
    training = True


class Trainer:
    """Forward keeps 50 and needs 10 more; backward frees them and makes gradients of 20, with 30
    more at its highest; the first step makes states of 40; zero_grad lets the gradients go."""

    def __init__(self, memory: Memory, *callbacks: Any) -> None:
        self.memory, self.callbacks, self.states = memory, callbacks, False
        self.control = type("Control", (), {})()

    def compute_loss(self, model: Any) -> str:
        self.memory.take(60)
        self.memory.take(-10)
        return "loss"

    def training_step(self, model: Any) -> str:
        loss = self.compute_loss(model)
        self.memory.take(30)
        self.memory.take(-60)
        return loss

    def tell(self, event: str, step: int, of: int) -> None:
        state = type("State", (), {"global_step": step, "max_steps": of})()
        for callback in self.callbacks:
            getattr(callback, event)(None, state, self.control, model=None)

    def train(self, steps: int) -> None:
        self.tell("on_train_begin", 0, steps)
        for step in range(steps):
            self.tell("on_step_begin", step, steps)
            self.training_step(Model())
            self.tell("on_pre_optimizer_step", step, steps)
            self.memory.take(0 if self.states else 40)
            self.states = True
            self.tell("on_optimizer_step", step, steps)
            self.memory.take(-20)
            self.tell("on_step_end", step + 1, steps)


def run(steps: int, marked: int, *, timed: bool = False) -> tuple[Probe, Trainer]:
    probe = Probe(None, steps=marked, timed=timed)
    probe.counters = memory = Memory()
    probe._count_gradients = lambda model: None  # type: ignore[method-assign]
    probe._count_states = lambda: None  # type: ignore[method-assign]
    memory.take(100)
    probe.level("load", "prepare")
    probe.level("prepare", "prepare")
    trainer = Trainer(memory, probe)
    probe.attach(trainer)
    trainer.train(steps)
    return probe, trainer


def test_phases_are_those_of_the_last_marked_step() -> None:
    probe, _ = run(4, 3)
    assert probe.phases() == {
        "load": {"end": 100, "peak": 100},
        "prepare": {"end": 100, "peak": 100},
        "forward": {"end": 140 + 50, "peak": 140 + 60},
        "backward": {"end": 140 + 20, "peak": 140 + 50 + 30},
        "optimizer_step": {"end": 160, "peak": 160},
    }
    assert probe.peak_phase() == "backward"
    assert len([m for m in probe.timeline if m["phase"] == "forward"]) == 3
    first = next(m for m in probe.timeline if m["phase"] == "optimizer")
    assert (first["end"], first["peak"]) == (160, 160)


def test_the_peak_is_of_all_steps_and_marks_are_gone_after_the_last() -> None:
    probe, trainer = run(3, 2)
    assert "compute_loss" not in vars(trainer)
    assert "training_step" not in vars(trainer)
    trainer.memory.take(1000)
    trainer.memory.take(-1000)
    probe.counters.note()
    assert probe.counters.highest == 1140
    assert len(probe.step_times) == 2


def test_every_step_is_timed_where_that_is_wanted() -> None:
    assert len(run(5, 2, timed=True)[0].step_times) == 5
    assert run(1, 3)[0].step_times  # a run shorter than the marks


def test_an_evaluation_is_no_phase() -> None:
    probe = Probe(None)
    probe.counters = memory = Memory()
    trainer = Trainer(memory, probe)
    probe.attach(trainer)
    model = Model()
    model.training = False
    assert trainer.compute_loss(model) == "loss"
    assert probe.timeline == []


def test_what_the_launcher_does_between_steps_is_nothing_beside_a_step() -> None:
    """After the marks: all callbacks of 10,000 steps, where the shortest real steps take 20 ms."""
    import time

    probe, _ = run(3, 3)
    trainer = Trainer(Memory(), probe, Progress(1024, Memory()), Stop(saves=True, alone=True))
    trainer.states = True
    bare = Trainer(Memory())
    began = time.perf_counter()
    bare.train(10_000)
    without = time.perf_counter() - began
    began = time.perf_counter()
    trainer.train(10_000)
    spent = time.perf_counter() - began - without
    assert spent / 10_000 < 200e-6  # 1 % of 20 ms; measured: some 10 microseconds


def test_a_request_to_stop_ends_the_run_after_its_step() -> None:
    stop = Stop(saves=True, alone=True)
    trainer = Trainer(Memory(), stop)
    trainer.tell("on_train_begin", 0, 9)
    trainer.tell("on_step_end", 1, 9)
    assert not vars(trainer.control)
    stop._asked(2, None)
    trainer.tell("on_step_end", 2, 9)
    assert vars(trainer.control) == {"should_save": True, "should_training_stop": True}
    assert stop.stopped
    before = Stop(saves=True, alone=True)
    with pytest.raises(KeyboardInterrupt):  # nothing to save yet
        before._asked(2, None)


def test_shortages_are_told_from_other_errors() -> None:
    import torch
    from vramplan_launcher.train import shortage, wanted

    text = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of"
    assert shortage(torch.OutOfMemoryError(text)) == "device"
    assert wanted(text) == 3 * 2**29
    host = (
        "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 131072000 bytes. Error code 12 (Cannot allocate memory)"
    )
    assert shortage(RuntimeError(host)) == "host"
    assert wanted(host) == 131_072_000
    assert shortage(MemoryError()) == "host"
    assert shortage(RuntimeError("could not create a primitive")) is None
    assert shortage(RuntimeError("could not create a primitive"), capped=True) == "host"
    assert shortage(ValueError("out of memory is what this is not")) is None
    assert wanted("nothing") is None
