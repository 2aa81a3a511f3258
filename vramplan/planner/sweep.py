"""Sweeps: one recipe with every combination of values of some of its fields."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from vramplan.errors import InvalidValue, UnknownName, UserError
from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.memory.estimate import Model, cards, estimate, resolve
from vramplan.planner.ladder import seconds_of
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.units import parse_count

MOST = 100_000
"""Combinations: more is a slip."""
_LORA = {f"lora_{f.name}": f.name for f in fields(LoRA)} | {"lora_targets": "target_modules"}
_ZERO = {
    "zero": "stage",
    "offload_optimizer": "offload_optimizer",
    "offload_param": "offload_param",
}
_ALIASES = {"seq": "seq_len", "batch": "batch_size", "rank": "lora_rank", "optim": "optimizer"}
NAMES = (*(f.name for f in fields(Recipe) if f.name != "deepspeed"), *_LORA, *_ZERO)
_COUNTS = ("batch_size", "seq_len", "gradient_accumulation_steps", "world_size", "lora_rank")
_NONE = ("none", "no")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One combination. Sizes are bytes."""

    values: dict[str, Any]
    recipe: Recipe | None
    """None: the libraries refuse it."""
    why: str = ""
    """Of a refused one: their reason. Of a real run that failed: what was said."""
    peak_allocated: int | None = None
    required: int | None = None
    fits: bool | None = None
    seconds: float | None = None
    """Of an optimizer step; None where no card is known."""
    tokens_per_second: float | None = None
    measured_peak: int | None = None
    """torch's peak in a real run; None: it was not run."""
    measured_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        return rest | {"recipe": None if self.recipe is None else self.recipe.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A table: a row a combination, the last name's values changing first."""

    id: str
    gpus: Gpus | None
    over: dict[str, tuple[Any, ...]]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "schema": 1,
            "model": {"id": self.id},
            "gpu": None if self.gpus is None else self.gpus.to_dict(),
            "over": {name: list(values) for name, values in self.over.items()},
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_csv(self) -> str:
        """The table, sizes in bytes, a line a row."""
        figures = ["peak_allocated", "required", "fits", "seconds", "tokens_per_second"]
        if any(row.measured_peak is not None for row in self.rows):
            figures += ["measured_peak", "measured_seconds"]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*self.over, *figures, "why"])
        for row in self.rows:
            cells = [getattr(row, name) for name in figures]
            writer.writerow([*row.values.values(), *cells, row.why])
        return out.getvalue()


def sweep(
    model: Model,
    recipe: Recipe,
    over: Mapping[str, Sequence[Any]],
    gpu: str | Gpu | Gpus | None = None,
) -> Sweep:
    """`recipe` with every combination of the values in `over`, by names as in NAMES.

    What the libraries refuse is a row with their reason. Raises UserError for an unknown name, and
    as `estimate` does for the model and the card.
    """
    name, arch, _ = resolve(model)
    gpus = cards(gpu)
    lists = {_named(key): tuple(values) for key, values in over.items()}
    size = 1
    for listed in lists.values():
        size *= len(listed)
    if not lists or size == 0 or size > MOST:
        raise InvalidValue("sweep", size, f"1 to {MOST} combinations of values")
    rows = []
    for combination in product(*lists.values()):
        values = dict(zip(lists, combination, strict=True))
        try:
            changed = with_values(recipe, values)
            needed = estimate(arch, changed, gpus)
        except (UnknownName, InvalidValue):  # whatever it is combined with
            raise
        except UserError as error:
            rows.append(Row(values=values, recipe=None, why=str(error)))
            continue
        seconds = None if gpus is None else seconds_of(needed, gpus)
        tokens = changed.batch_size * changed.seq_len
        tokens *= changed.gradient_accumulation_steps * changed.world_size
        rows.append(
            Row(
                values=values,
                recipe=changed,
                peak_allocated=needed.peak_allocated,
                required=needed.required,
                fits=needed.fits,
                seconds=seconds,
                tokens_per_second=None if seconds is None else tokens / seconds,
            )
        )
    return Sweep(id=name, gpus=gpus, over=lists, rows=tuple(rows))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`recipe` with other values, of adapters and ZeRO too. Raises UserError."""
    document = recipe.to_dict()
    for name, value in values.items():
        if name in _LORA:
            document["lora"] = {**(document["lora"] or {}), _LORA[name]: value}
        elif name in _ZERO:
            document["deepspeed"] = _zero(document["deepspeed"], name, value)
        else:
            document[name] = value
    return Recipe.from_dict(document)


def _zero(base: dict[str, Any] | None, name: str, value: Any) -> dict[str, Any] | None:
    if name == "zero" and value is None:
        return None
    return {**(base or {}), _ZERO[name]: value}


def _named(name: str) -> str:
    wanted = name.strip().lower().replace("-", "_")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in NAMES:
        raise UnknownName("field to sweep over", name, [n.replace("_", "-") for n in NAMES])
    return wanted


def parse_over(text: str) -> tuple[str, tuple[Any, ...]]:
    """(name, values) of "lora-rank=8,128" or "seq=1k,4k". Raises UserError."""
    name, equals, listed = text.partition("=")
    values = [value for part in listed.split(",") if (value := part.strip())]
    if not equals or not values:
        raise InvalidValue("--over", text, "a name and its values, such as seq=1024,4096")
    known = _named(name)
    return known, tuple(_value(known, value) for value in values)


def _value(name: str, text: str) -> Any:
    low = text.lower()
    if name in _COUNTS:
        return parse_count(text, thing=name)
    if name in ("quantization", "zero", "offload_optimizer", "offload_param") and low in _NONE:
        return None
    if name == "zero":
        return int(text) if text.isdigit() else text
    if name in ("double_quant", "gradient_checkpointing", "lora"):
        if low not in ("yes", "no", "true", "false", "on", "off"):
            raise InvalidValue(name, text, "yes or no")
        return low in ("yes", "true", "on")
    if name in ("lora_dropout", "lora_alpha"):
        try:
            return float(text)
        except ValueError:
            raise InvalidValue(name, text, "a number") from None
    if name in ("lora_targets", "lora_target_modules") and "+" in text:
        return tuple(text.split("+"))
    return text
