"""A ds_config.json and the rest of a recipe: what each says, and which wins.

Options win over the file, as they do over a recipe file: to ask what another value would do. The
file wins over a recipe file. What differs is said, since Trainer refuses a ds_config.json that
differs from TrainingArguments (transformers 5.17, HfTrainerDeepSpeedConfig.fill_match).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vramplan.errors import IllegalRecipe, UserError
from vramplan.recipe.ds_config import DsConfig, read_ds_config
from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.recipe.recipe import Recipe

_KEYS = {
    "batch_size": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "mixed_precision": "bf16 and fp16",
    "optimizer": "optimizer.type",
}
_NONE = ("none", "no")


def merged(
    source: str | os.PathLike[str] | Mapping[str, Any],
    values: Mapping[str, Any],
    chosen: Mapping[str, Any],
    cards: int | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`values` with what the file (or its contents) says, and what there is to warn of.

    `values`: fields of a recipe file; `chosen`: the options that were given, with `zero` for the
    stage; `cards`: how many were named.

    Raises UserError for a malformed file, and for a batch that contradicts train_batch_size.
    """
    stage = chosen.get("zero")
    if stage is not None and stage.lower() in _NONE:
        raise IllegalRecipe(
            f"--zero {stage} and --deepspeed contradict each other: leave one of them out"
        )
    config = read_ds_config(source, stage=int(stage) if stage and stage.isdigit() else stage)
    merger = _Merger(config, dict(values), chosen)
    merger.deepspeed(read_ds_config(source) if stage else config)
    merger.fields()
    merger.ranks(cards)
    return merger.values, (*config.warnings, *merger.warnings)


class _Merger:
    def __init__(self, config: DsConfig, values: dict[str, Any], chosen: Mapping[str, Any]) -> None:
        self.config, self.values, self.chosen = config, values, chosen
        self.warnings: list[str] = []
        self.overridden: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self.config.name}: {text}")

    def deepspeed(self, as_written: DsConfig) -> None:
        """The file's settings replace a recipe's; options replace single ones."""
        theirs, mine = self.values.get("deepspeed"), self.config.deepspeed
        if theirs is not None:
            self.warn("its settings replace the recipe file's deepspeed")
        written = as_written.deepspeed
        if written.stage != mine.stage:
            self.warn(f"--zero {mine.stage} overrides zero_optimization.stage {written.stage}")
        for name in ("offload_optimizer", "offload_param"):
            given, found = self.chosen.get(name), getattr(written, name) or "none"
            if given is not None and given != found:
                option = name.replace("_", "-")
                self.warn(f"--{option} {given} overrides zero_optimization.{name} {found}")
        self.values["deepspeed"] = mine.to_dict()

    def fields(self) -> None:
        found = {
            "batch_size": self.config.batch_size,
            "gradient_accumulation_steps": self.config.accumulation,
            "mixed_precision": self.config.precision,
            "optimizer": self.config.optimizer,
        }
        for name, value in found.items():
            if value is not None:
                self._field(name, value)

    def _field(self, name: str, value: Any) -> None:
        given, mine = self.chosen.get(name), self.values.get(name)
        if given is not None:
            if _same(name, given, value):
                return
            self.overridden.append(name)
            option = name.replace("_", "-")
            does = (
                "would ignore the option" if name == "optimizer" else "would refuse both together"
            )
            self.warn(
                f"--{option} {given} overrides {_KEYS[name]} ({value}); Trainer {does}: change the "
                "file for the run"
            )
            return
        if mine is not None and _same(name, mine, value):
            return
        if mine is not None and mine != getattr(Recipe(), name):
            self.warn(f"{_KEYS[name]} ({value}) replaces {name} {mine} of the recipe file")
        self.values[name] = value

    def ranks(self, cards: int | None) -> None:
        """train_batch_size = micro x accumulation x ranks, as DeepSpeed asserts it."""
        known = self.chosen.get("world_size")
        if known is None and self.values.get("world_size", 1) != 1:
            known = self.values["world_size"]
        if known is None and cards is not None and cards > 1:
            known = cards
        train = self.config.train_batch_size
        if train is not None:
            micro, steps = (self._now(n) for n in ("batch_size", "gradient_accumulation_steps"))
            if any(
                name in self.overridden for name in ("batch_size", "gradient_accumulation_steps")
            ):
                self.warn(f"train_batch_size {train} is left aside: an option overrides the batch")
            elif known is None:
                known = self._implied(train, micro, steps)
            elif train != micro * steps * known:
                raise UserError(
                    f"{self.config.name}: train_batch_size is {train}, but {micro} "
                    f"(train_micro_batch_size_per_gpu) x {steps} (gradient_accumulation_steps) x "
                    f"{known} (GPUs) = {micro * steps * known}: DeepSpeed refuses. Set it to "
                    f'{micro * steps * known} or "auto", or change one of the others'
                )
        if known is not None:
            self.values["world_size"] = known

    def _now(self, name: str) -> int:
        return int(self.chosen.get(name) or self.values.get(name) or getattr(Recipe(), name))

    def _implied(self, train: int, micro: int, steps: int) -> int:
        if train % (micro * steps):
            raise UserError(
                f"{self.config.name}: train_batch_size is {train}, but {micro} "
                f"(train_micro_batch_size_per_gpu) x {steps} (gradient_accumulation_steps) = "
                f"{micro * steps} does not divide it: DeepSpeed refuses, whatever the number of "
                "GPUs"
            )
        ranks = train // (micro * steps)
        if ranks > 1:
            self.warn(f"train_batch_size {train} = {micro} x {steps} x {ranks} GPUs")
        return ranks


def _same(name: str, one: Any, other: Any) -> bool:
    """Equal, or optimizers that DeepSpeed runs as one (adamw_torch, adamw_torch_fused)."""
    if name != "optimizer" or one not in OPTIMIZERS:
        return bool(one == other)
    mine, its = OPTIMIZERS[one], OPTIMIZERS[other]
    return (mine.package, mine.algorithm) == (its.package, its.algorithm)
