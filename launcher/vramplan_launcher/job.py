"""Job: everything that a launched run is told, as one JSON file in its folder. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vramplan.errors import InvalidValue, UnknownName, UserError
from vramplan.recipe.recipe import Recipe
from vramplan_launcher.files import read_json, write_json

JOB = "job.json"
REPORTERS = ("none", "tensorboard", "wandb")
LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}
"""What is taken where none is given: peft's QLoRA example, and common for full fine-tuning."""
VERIFIED_STEPS = 8
"""Optimizer steps of a run that only measures: three marked ones, and five timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What of transformers' TrainingArguments has no bearing on memory, or little."""

    epochs: float = 1.0
    """num_train_epochs; `max_steps` wins over it."""
    max_steps: int | None = None
    learning_rate: float | None = None
    """None: 2e-4 with LoRA, 2e-5 without."""
    lr_scheduler: str = "cosine"
    """lr_scheduler_type."""
    warmup: float = 0.03
    """warmup_steps: a number of steps, or below 1 a share of all."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42
    logging_steps: int | None = None
    """Steps between two readings of the loss; None: 10, and more often in a short run."""
    eval_steps: int | None = None
    """Steps between two evaluations; None: at each epoch's end. Only with evaluation data."""
    save_steps: int | None = None
    """Steps between two checkpoints; None: at each epoch's end; 0: none but the last."""
    save_total_limit: int | None = 2
    """Older checkpoints than so many are deleted."""
    report_to: str = "none"
    resume: str | None = None
    """A checkpoint folder to go on from."""

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 0, open_=True)
        _at_least("max_steps", self.max_steps, 1)
        _at_least("learning_rate", self.learning_rate, 0)
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed", "save_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("logging_steps", "eval_steps", "save_total_limit"):
            _at_least(name, getattr(self, name), 1)
        if self.report_to not in REPORTERS:
            raise UnknownName("report_to", self.report_to, REPORTERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One launched run. Sizes are bytes."""

    model: str
    """A Hub id, a folder or a config.json, as `vramplan.estimate` takes it."""
    recipe: Recipe
    gpu: str | None = None
    """The card that the prediction is for; None: what is in the machine."""
    data: Mapping[str, Any] | None = None
    """Fields of `DataSpec`; None: synthetic tokens."""
    training: Training = field(default_factory=Training)
    random_weights: bool = False
    """Weights drawn from the model's own initialization, where a checkpoint can't be had."""
    emulate: int | None = None
    """Bytes of a smaller card that this one is to act as."""
    pretend_ranks: int | None = None
    """Rank 0 of so many, alone: memory is real, nothing is trained."""
    verify: bool = False
    """A short run on synthetic tokens, only to measure: nothing is saved."""
    cpu: bool = False
    """Run on the processor: there are no memory figures then."""
    marked_steps: int = 3
    """Optimizer steps in which the phases are measured."""
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InvalidValue("model", self.model, "a Hub id, a folder or a config.json")
        if isinstance(self.recipe, Mapping):
            object.__setattr__(self, "recipe", Recipe.from_dict(self.recipe))
        if isinstance(self.training, Mapping):
            object.__setattr__(self, "training", _of(Training, "training option", self.training))
        _at_least("emulate", self.emulate, 1)
        _at_least("pretend_ranks", self.pretend_ranks, 1)
        _at_least("marked_steps", self.marked_steps, 1)
        self._check_ranks()
        if self.cpu and self.recipe.mixed_precision == "fp16":
            raise UserError(
                "--cpu with mixed precision fp16: transformers' Trainer scales fp16 gradients on "
                "a GPU only. Use bf16 or no"
            )

    def _check_ranks(self) -> None:
        ranks = self.pretend_ranks
        if ranks is None:
            return
        if self.recipe.deepspeed is None:
            raise UserError(
                "--pretend-ranks without ZeRO: torch's data parallelism fails in its hooks under "
                "a pretended process group. Add --zero 1, 2 or 3"
            )
        if ranks != self.recipe.world_size:
            raise UserError(
                f"--pretend-ranks {ranks} and world_size {self.recipe.world_size} contradict each "
                "other: leave one of them out"
            )
        if self.data is not None:
            raise UserError("--pretend-ranks trains nothing: leave out --data")

    @property
    def processes(self) -> int:
        """Of all machines together."""
        return 1 if self.pretend_ranks else self.recipe.world_size

    @property
    def trains(self) -> bool:
        """Whether what comes out is worth keeping."""
        return not (self.verify or self.pretend_ranks)

    @property
    def learning_rate(self) -> float:
        """As given, or the method's usual one."""
        given = self.training.learning_rate
        if given is not None:
            return given
        return LEARNING_RATE["full" if self.recipe.lora is None else "lora"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["recipe"] = self.recipe.to_dict()
        values["training"] = {f.name: getattr(self.training, f.name) for f in fields(Training)}
        values["data"] = None if self.data is None else dict(self.data)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """The reverse of `to_dict`. Raises UserError."""
        return _of(cls, "job field", values)

    def write(self, folder: Path, **beside: Any) -> Path:
        """Writes job.json; `beside` (the prediction and the like) goes into it too."""
        return write_json(folder / JOB, {"schema": 1, **self.to_dict(), **beside})


def read_job(path: Path) -> tuple[Job, dict[str, Any]]:
    """The job in a job.json, and what is beside it there. Raises UserError."""
    document = read_json(path, "job file")
    document.pop("schema", None)
    names = {f.name for f in fields(Job)}
    beside = {key: value for key, value in document.items() if key not in names}
    return Job.from_dict({k: v for k, v in document.items() if k in names}), beside


def _of(cls: Any, thing: str, values: Mapping[str, Any]) -> Any:
    names = tuple(f.name for f in fields(cls))
    for key in values:
        if key not in names:
            raise UnknownName(thing, key, names)
    try:
        return cls(**values)
    except TypeError as error:  # a field that has no default was left out
        raise UserError(f"{thing}s: {error}") from error


def _at_least(thing: str, value: Any, least: float, *, open_: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least or (open_ and value == least):
        raise InvalidValue(thing, value, f"{'more than' if open_ else 'at least'} {least:g}")


def dumps(document: Any) -> str:
    """One line of JSON."""
    return json.dumps(document, separators=(",", ":"))
