"""What a launched run adds to Trainer's loop: progress for the parent, and a clean stop."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from transformers import TrainerCallback

from vramplan_launcher.events import tell
from vramplan_launcher.memory_reading import Counters

SECONDS = 1.0
"""Between two reports of progress."""
_KEPT = 10_000


class Progress(TrainerCallback):
    """Tells the parent the step, its loss, tokens a second, memory, and what is left."""

    def __init__(self, tokens_per_step: int, counters: Counters) -> None:
        self.tokens, self.counters = tokens_per_step, counters
        self.loss: float | None = None
        self.losses: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        """Between the ends of two steps, with all that is between them: at most `_KEPT`."""
        self.first = 0
        self._told = self._ended = 0.0
        self._at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The clock starts; a resumed run starts at its step."""
        self.first = self._at = state.global_step
        self._told = self._ended = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """At most one report a second."""
        now = time.perf_counter()
        if len(self.seconds) < _KEPT:
            self.seconds.append(now - self._ended)
        self._ended = now
        if state.global_step == self.first + 1:  # the first step is slower: kernels are loaded
            self._told, self._at = now, state.global_step
            self._tell(state, None)
        elif now - self._told >= SECONDS or state.global_step == state.max_steps:
            self._tell(state, (now - self._told) / max(1, state.global_step - self._at))
            self._told, self._at = now, state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Trainer's own reading of the loss."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.losses.append((state.global_step, self.loss))
        if logs and "eval_loss" in logs:
            tell("evaluated", step=state.global_step, loss=float(logs["eval_loss"]))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A checkpoint is complete."""
        tell("saved", step=state.global_step)

    def _tell(self, state: Any, seconds: float | None) -> None:
        left = None if seconds is None else seconds * (state.max_steps - state.global_step)
        tell(
            "step",
            step=state.global_step,
            of=state.max_steps,
            loss=self.loss,
            tokens_per_second=None if not seconds else round(self.tokens / seconds, 1),
            seconds_left=None if left is None else round(left, 1),
            peak=max(self.counters.highest, self.counters.peak() or 0) or None,
        )


class Stop(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that runs, with a checkpoint.

    Of several ranks all must stop after the same step: each tells the others through a reduction
    on the host, whose answer is read a step later, so that no step waits for it.
    """

    def __init__(self, *, saves: bool, alone: bool) -> None:
        self.saves, self.alone = saves, alone
        self.asked = self.stopped = self.training = False
        self.group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def listen(self) -> None:
        """From now on signals only ask; before training there is nothing to save."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: Any) -> None:
        if not self.training:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A group on the host, beside the one on the devices."""
        self.training = True
        if not self.alone:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Stop here, if anyone asked."""
        if self._agreed() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = self.saves
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """What is left of the last reduction."""
        self.training = False
        if self._pending is not None:
            self._pending[0].wait()

    def _agreed(self) -> bool:
        if self.group is None:
            return self.asked
        agreed = False
        if self._pending is not None:
            work, answer = self._pending
            work.wait()
            agreed = bool(answer.item())
        mine = torch.tensor([int(self.asked)])
        work = torch.distributed.all_reduce(
            mine, op=torch.distributed.ReduceOp.MAX, group=self.group, async_op=True
        )
        self._pending = (work, mine)
        return agreed
