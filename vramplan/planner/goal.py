"""Goal: what a plan has to do, and what of the recipe its owner has decided already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any, Literal

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.recipe.deepspeed import DEVICES, DeepSpeed
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.units import GIB

METHODS = ("full", "lora", "int8", "qlora")
"""In the order of quality that plans follow where none is named: all weights trained; adapters on
weights as published; adapters on weights rounded to 8 bits (LLM.int8); and to 4 bits (NF4)."""
METHOD_NAMES = {"full": "full fine-tuning", "lora": "LoRA", "int8": "int8 LoRA", "qlora": "QLoRA"}
_QUANTIZATIONS = {"full": (None,), "lora": (None,), "int8": ("int8",), "qlora": ("nf4", "fp4")}

HOST_A_CARD = 128 * GIB
"""Host memory where it is not known, a card. Machines of public clouds have 85 GiB (Google's
a2-highgpu-1g), 144 (Amazon's p4d.24xlarge), 256 (p5.48xlarge)."""

Objective = Literal["cost", "time"]
OBJECTIVES: tuple[Objective, ...] = ("cost", "time")

ZERO_PINS = ("zero", "offload_optimizer", "offload_param", "nvme_path")
"""Parts of DeepSpeed that can be decided by themselves; `zero` is the stage, or None."""
_OFFLOADS = ("offload_optimizer", "offload_param")
_NOT_PINS = ("lora", "seq_len")  # the goal has fields of its own for these
PINS = (*(f.name for f in fields(Recipe) if f.name not in _NOT_PINS), *ZERO_PINS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is to be trained, and what is decided. All else is the planner's to choose.

    Raises UnknownName, InvalidValue or IllegalRecipe (two decisions that contradict each other).
    """

    methods: tuple[str, ...] | None = None
    """Those to consider, of METHODS; None: all, the best that fits on the cards first."""
    seq_len: int = 2048
    """Tokens a sequence."""
    effective_batch: int = 16
    """Sequences to an optimizer step: micro-batch x accumulation x ranks."""
    lora: LoRA | Mapping[str, Any] | None = None
    """The adapters of methods that have them, or those of their fields that are decided; None:
    rank 16 on all linear layers."""
    tokens: int = 10_000_000
    """Tokens to train on: what hours and cost are of."""
    pins: Mapping[str, Any] = field(default_factory=dict)
    """Decided values by their names in Recipe, or in ZERO_PINS."""
    allow_8bit_optim: bool = False
    """Whether AdamW with 8-bit states may be chosen: less memory, and rounded states."""
    price: float | None = None
    """Dollars for an hour of one card; None: the table of list prices."""
    objective: Objective = "cost"
    """What is least among the plans of a method: cost (card-hours x price), or time."""
    host_memory: int | None = None
    """Bytes of host memory for what is offloaded; None: this machine's, where the cards are in it,
    and else HOST_A_CARD for each."""

    def __post_init__(self) -> None:
        if self.methods is not None:
            object.__setattr__(self, "methods", _methods(self.methods))
        for name in ("seq_len", "effective_batch", "tokens"):
            _check_count(name, getattr(self, name))
        if self.price is not None and not (_is_number(self.price) and 0 <= self.price < inf):
            raise InvalidValue("price", self.price, "dollars an hour, of at least 0")
        if self.objective not in OBJECTIVES:
            raise UnknownName("objective", self.objective, OBJECTIVES)
        if isinstance(self.lora, Mapping):
            LoRA.from_dict(self.lora)
        elif self.lora is not None and not isinstance(self.lora, LoRA):
            raise InvalidValue("lora", self.lora, "a LoRA, a mapping of its fields, or None")
        if self.host_memory is not None:
            _check_count("host_memory", self.host_memory)
        if not isinstance(self.pins, Mapping):
            raise InvalidValue("pins", self.pins, "a mapping of a recipe's fields to values")
        if type(self.allow_8bit_optim) is not bool:
            raise InvalidValue("allow_8bit_optim", self.allow_8bit_optim, "True or False")
        for name, value in self.pins.items():
            if name not in PINS:
                raise UnknownName("pin", name, PINS)
            _check_value(name, value)
        _check_pins(self)

    @property
    def considered(self) -> tuple[str, ...]:
        """The methods that the pins leave, the best first."""
        return tuple(m for m in self.methods or METHODS if _why_not(m, self.pins) is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["methods"] = None if self.methods is None else list(self.methods)
        values["lora"] = self.lora.to_dict() if isinstance(self.lora, LoRA) else self.lora
        zero = self.pins.get("deepspeed")
        values["pins"] = dict(self.pins)
        if zero is not None:
            values["pins"]["deepspeed"] = zero.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Goal:
        """The reverse of `to_dict`. Raises UserError."""
        names = tuple(f.name for f in fields(cls))
        for key in values:
            if key not in names:
                raise UnknownName("goal field", key, names)
        given = dict(values)
        pins = dict(given.get("pins") or {})
        if pins.get("deepspeed") is not None:
            pins["deepspeed"] = DeepSpeed.from_dict(pins["deepspeed"])
        return cls(**{**given, "pins": pins})


def _methods(names: object) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else names
    given = tuple(given) if isinstance(given, Iterable) else ()
    for name in given:
        if name not in METHODS:
            raise UnknownName("method", name, METHODS, closest=_SAME_AS.get(str(name).lower()))
    if not given:
        raise InvalidValue("methods", names, f"one or more of {', '.join(METHODS)}, or None")
    return tuple(m for m in METHODS if m in given)


_SAME_AS = {"sft": "full", "adapters": "lora", "8bit": "int8", "4bit": "qlora", "nf4": "qlora"}


def method_of(recipe: Recipe) -> str:
    """The method that a recipe is of."""
    if recipe.lora is None:
        return "full"
    if recipe.quantization is None:
        return "lora"
    return "int8" if recipe.quantization == "int8" else "qlora"


def quantizations(method: str) -> tuple[str | None, ...]:
    """The values of `quantization` that make a method."""
    return _QUANTIZATIONS[method]


def _check_value(name: str, value: object) -> None:
    """Raises UnknownName or InvalidValue for a value that the field never takes."""
    if name == "optimizer" and isinstance(value, str):
        find_optimizer(value)
    if name == "zero":
        if value is not None:
            DeepSpeed(stage=value)  # type: ignore[arg-type]
        return
    if name in _OFFLOADS:
        if value is not None and value not in DEVICES:
            raise UnknownName(f"deepspeed.{name}", value, DEVICES)
        return
    if name == "nvme_path":
        return
    try:
        Recipe(**{name: value})  # type: ignore[arg-type]
    except IllegalRecipe:
        return  # legal with something else, perhaps


# --- contradictions -------------------------------------------------------------------------


def _why_not(method: str, pins: Mapping[str, Any]) -> str | None:
    """The pin that rules a method out, in words; None: none does."""
    if "quantization" in pins and pins["quantization"] not in _QUANTIZATIONS[method]:
        return f"quantization {_word(pins['quantization'])}"
    return None


def _check_pins(goal: Goal) -> None:
    """Raises IllegalRecipe for two decisions that can't both be honoured, and names them."""
    pins = goal.pins
    if goal.methods is not None:
        for method in goal.methods:
            reason = _why_not(method, pins)
            if reason is not None and not goal.considered:
                raise contradiction(f"method {method}", reason)
    _check_batch(goal)
    _check_zero(pins)


def contradiction(one: str, other: str, why: str = "") -> IllegalRecipe:
    """The error that names two decisions."""
    tail = f": {why}" if why else ""
    return IllegalRecipe(f"{one} and {other} contradict each other{tail}. Leave one of them out")


def _check_batch(goal: Goal) -> None:
    factors = ("batch_size", "gradient_accumulation_steps", "world_size")
    pinned = [(n, goal.pins[n]) for n in factors if n in goal.pins]
    product = 1
    for name, value in pinned:
        _check_count(name, value)
        product *= value
    whole = len(pinned) == len(factors)
    if goal.effective_batch % product == 0 and not (whole and product != goal.effective_batch):
        return
    said = " x ".join(f"{name} {value}" for name, value in pinned)
    why = f"{product} sequences at a time do not make a step of {goal.effective_batch}"
    raise contradiction(said, f"effective batch {goal.effective_batch}", why)


def _check_zero(pins: Mapping[str, Any]) -> None:
    """Of ZeRO's parts, those that DeepSpeed can't have together."""
    named = [n for n in ZERO_PINS if n in pins]
    if "deepspeed" in pins and named:
        raise contradiction("deepspeed", named[0].replace("_", " "), "one holds the other")
    path = pins.get("nvme_path")
    if path is not None and "nvme" not in [pins.get(name) for name in _OFFLOADS]:
        raise IllegalRecipe(
            f"nvme_path {path!r} with nothing that goes there: add offload_optimizer nvme "
            "(--offload-optimizer nvme) or offload_param nvme (--offload-param nvme)"
        )
    stage = pins.get("zero", 3)
    for name in _OFFLOADS:
        if pins.get(name) is None:
            continue
        if stage is None:
            raise contradiction("no ZeRO", f"{name} {pins[name]}", "ZeRO is what offloads")
        fields: dict[str, Any] = {name: pins[name], "nvme_path": path}
        if pins[name] == "nvme" and path is None:
            DeepSpeed(stage=3, **fields)  # says what is missing
        try:
            DeepSpeed(stage=stage, **fields)
        except IllegalRecipe as error:
            raise contradiction(f"ZeRO stage {stage}", f"{name} {pins[name]}", str(error)) from None


def _word(value: object) -> str:
    return "none" if value is None else str(value)


def _check_count(thing: str, value: object) -> None:
    if type(value) is bool or not isinstance(value, int) or value < 1:
        raise InvalidValue(thing, value, "an integer of at least 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool
