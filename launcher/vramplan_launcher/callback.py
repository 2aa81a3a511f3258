"""MemoryCheck: prediction and comparison in a training script of one's own."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any, TextIO

from transformers import TrainerCallback

from vramplan.errors import UserError
from vramplan.memory.estimate import Estimate, estimate
from vramplan.recipe.recipe import Recipe
from vramplan.reports.run import RunComparison, compare, predicted, render
from vramplan.units import format_bytes
from vramplan_launcher.memory_reading import Counters, driver_says
from vramplan_launcher.observed import config_of, recipe_of


class MemoryWarning(UserWarning):
    """The run is predicted not to fit."""


class MemoryCheck(TrainerCallback):
    """Says before step one what a `Trainer`'s run will need, and at its end how that held.

        trainer = Trainer(..., callbacks=[MemoryCheck()])

    It works with what is built on `Trainer` too (TRL's SFTTrainer). The recipe is read off the
    model and the arguments; `recipe` overrides it, `seq_len` only the length. `gpu` is the card to
    judge by: None is the one that the model is on. What it measures is the whole process's from
    the model on; in the first `steps` steps also by phase. `comparison` is there after training.
    """

    def __init__(
        self,
        *,
        recipe: Recipe | None = None,
        seq_len: int | None = None,
        gpu: str | None = None,
        steps: int = 3,
        stream: TextIO | None = None,
    ) -> None:
        self.recipe, self.seq_len, self.gpu, self.steps = recipe, seq_len, gpu, steps
        self.stream = stream
        self.estimate: Estimate | None = None
        self.comparison: RunComparison | None = None
        self._counters = Counters(None)
        self._phases: dict[str, dict[str, int | None]] = {}
        self._handles: list[Any] = []
        self._done = 0
        self._main = True

    # --- the callback's own events -----------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The prediction; marks from now on."""
        model = more["model"]
        self._main = bool(state.is_world_process_zero)
        device = args.device
        self._counters = Counters((device.index or 0) if device.type == "cuda" else None)
        self._phases["prepare"] = {"end": self._counters.now(), "peak": self._counters.peak()}
        try:
            self._predict(model, args, more.get("train_dataloader"))
        except UserError as error:
            self._say(f"vramplan: no prediction: {error}")
        if self._counters.here:
            self._handles = [
                model.register_forward_pre_hook(self._before_forward),
                model.register_forward_hook(self._after_forward),
            ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Backward is over."""
        if self._handles:
            self._mark("backward")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The optimizer has stepped."""
        if self._handles:
            self._mark("optimizer_step")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """After the last marked step nothing is left of it in the loop."""
        self._done += 1
        if self._handles and self._done >= self.steps:
            self._let_go()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The comparison."""
        self._let_go()
        self._counters.note()
        if self.estimate is None:
            return
        self.comparison = compare(self._measurement())
        self._say(render(self.comparison))

    # --- prediction --------------------------------------------------------------------------

    def _predict(self, model: Any, args: Any, loader: Any) -> None:
        dataset = getattr(loader, "dataset", None)
        recipe = self.recipe or recipe_of(model, args, dataset, self.seq_len)
        self.estimate = needed = estimate(config_of(model), recipe, self._card())
        text = (
            f"vramplan: this run will need {format_bytes(needed.required)} "
            f"({format_bytes(needed.peak_allocated)} at the peak of torch's allocator)"
        )
        room = needed.available
        if needed.gpu is None or room is None:
            self._say(f"{text}.")
            return
        self._say(f"{text} of {format_bytes(room)} on {needed.gpu.gpu.name}.")
        if needed.fits is False:
            warnings.warn(
                f"{format_bytes(needed.required - room)} more than there is: this run will "
                "probably end out of memory. `vramplan estimate --advice` says what would help",
                MemoryWarning,
                stacklevel=2,
            )

    def _card(self) -> Any:
        if self.gpu is not None or not self._counters.here:
            return self.gpu
        import torch

        from vramplan.hardware.catalogue import Gpus, gpu_from_driver

        card = torch.cuda.get_device_properties(self._counters.device)
        free, total = torch.cuda.mem_get_info(self._counters.device)
        gpu = gpu_from_driver(
            card.name, memory=total, usable=total, compute_capability=(card.major, card.minor)
        )
        mine = total - free  # this process has it already: the model, the context
        reserved = torch.cuda.memory_reserved(self._counters.device)
        return Gpus(gpu=gpu, free=total - max(0, mine - reserved - _context(self._counters.device)))

    def _say(self, text: str) -> None:
        if self._main:
            print(text, file=self.stream or sys.stderr, flush=True)

    # --- marks -------------------------------------------------------------------------------

    def _before_forward(self, module: Any, inputs: Any) -> None:
        if module.training:
            self._counters.reset()

    def _after_forward(self, module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            self._mark("forward")
            # The logits are still there: what is predicted is the end of Trainer.compute_loss.
            self._phases["forward"]["end"] = None

    def _mark(self, phase: str) -> None:
        self._phases[phase] = {"end": self._counters.now(), "peak": self._counters.peak()}
        self._counters.reset()

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _measurement(self) -> Mapping[str, Any]:
        assert self.estimate is not None
        counters, here = self._counters, self._counters.here
        rank: dict[str, Any] = {"rank": 0, "outcome": "ended", "categories": {}}
        rank["peak_allocated"] = counters.highest if here else None
        rank["phases"] = self._phases if here else {}
        rank["outside_allocator"] = _context(counters.device) or None
        return {
            "name": time.strftime("%Y-%m-%d %H:%M"),
            "outcome": "ended",
            "model": {"id": self.estimate.id},
            "recipe": self.estimate.recipe.to_dict(),
            "prediction": predicted(self.estimate),
            "ranks": [rank],
            "notes": [] if here else ["on the processor: there are no GPU memory figures"],
        }


def _context(device: int | None) -> int:
    """What the driver counts for this process beyond torch's allocator; 0 where it won't tell."""
    if device is None:
        return 0
    import torch

    said = driver_says(device)
    used = said.get("process") or said.get("only_process")
    return max(0, used - torch.cuda.memory_reserved(device)) if used else 0
