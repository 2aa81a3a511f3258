"""What would lower a run's memory: single changes to a recipe, each computed, and a mix that fits.

A change is offered if it makes a legal recipe and saves something. Savings do not add up: what one
change takes off, another may not find any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from vramplan.errors import UserError
from vramplan.memory.estimate import Estimate, estimate
from vramplan.models.tensors import inventory
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import OPTIMIZERS
from vramplan.recipe.recipe import ALL_LINEAR, LoRA, Recipe

SHORTEST = 128
"""Tokens: no shorter sequence is offered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A recipe other than the one asked about, and what it would do. Sizes are bytes."""

    name: str
    recipe: Recipe
    required: int
    """Device memory that the run would need."""
    saving: int
    """`required` of the recipe asked about, less this one's."""
    fits: bool | None
    """Whether it would fit; None where no GPU is known."""
    managed: int
    """Optimizer states in CUDA managed memory, which is not in `required`."""
    flags: tuple[str, ...]
    """What to add to the command line."""
    alters_training: bool
    """Whether the trained model would be another: less of it trained, on less, or in less
    precision."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"recipe": self.recipe.to_dict(), "flags": list(self.flags)}


def advise(needed: Estimate) -> tuple[Change, ...]:
    """The single changes that lower `needed.required`, the greatest saving first."""
    found = []
    for option in _options(needed):
        then = _tried(needed, option.values)
        if then is not None and then.required < needed.required:
            found.append(_change(needed, then, option.name, option.severity > 0))
    return tuple(sorted(found, key=lambda change: -change.saving))


def combine(needed: Estimate) -> Change | None:
    """A combination of changes that fits; None where none is found, or none is needed.

    Greedy: step by step the change that saves most is taken; where one fits, the mildest that
    does; then whatever turned out needless is undone. What alters training is left alone as long
    as the rest suffices, and the sequence as long as anything else does.
    """
    if needed.fits is not False:
        return None
    for severity in range(_SEVEREST + 1):
        found = _greedy(needed, severity)
        if found is not None:
            found = _without_needless(needed, found)
            return _change(needed, found, *_named(found.recipe, needed.recipe))
    return None


def recipe_flags(recipe: Recipe, base: Recipe = Recipe()) -> tuple[str, ...]:  # noqa: B008
    """The options of `vramplan estimate` that turn `base` into `recipe`."""
    flags: list[str] = []
    for field in fields(Recipe):
        old, new = getattr(base, field.name), getattr(recipe, field.name)
        if field.name == "lora":
            flags += _lora_flags(new, old)
        elif field.name == "deepspeed":
            flags += _zero_flags(new, old)
        elif old != new:
            flags += _flag(field.name, new)
    return tuple(flags)


def _lora_flags(new: LoRA | None, old: LoRA | None) -> Iterator[str]:
    if new is None:
        if old is not None:
            yield "--no-lora"
        return
    differ = [
        f.name for f in fields(LoRA) if getattr(new, f.name) != getattr(old or LoRA(), f.name)
    ]
    if old is None and not differ:
        yield "--lora"
    for name in differ:
        value = getattr(new, name)
        if name == "target_modules":
            yield from ("--lora-targets", value if value == ALL_LINEAR else ",".join(value))
        elif value is not None:  # alpha, back to its default: costs nothing, needs no flag
            yield from _flag(f"lora_{name}", value)


def _zero_flags(new: DeepSpeed | None, old: DeepSpeed | None) -> Iterator[str]:
    """Of ZeRO's settings those that have an option; others are in a recipe file."""
    if new is None:
        if old is not None:
            yield from ("--zero", "no")
        return
    if old is None or new.stage != old.stage:
        yield from ("--zero", str(new.stage))
    for name in ("offload_optimizer", "offload_param"):
        if getattr(new, name) != getattr(old, name, None):
            yield from _flag(name, getattr(new, name))


def _flag(name: str, value: object) -> tuple[str, ...]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return (f"--{option}" if value else f"--no-{option}",)
    if isinstance(value, float):
        return f"--{option}", f"{value:g}"
    if isinstance(value, tuple):
        return f"--{option}", ",".join(value)
    return f"--{option}", "none" if value is None else str(value)


# --- the changes ----------------------------------------------------------------------------


class _Option(NamedTuple):
    """A change before it is computed."""

    name: str
    values: dict[str, Any]
    """Of the recipe's fields."""
    severity: int = 0
    """0: the same training; 1: less of the model is trained, or weights or states are rounded; 2:
    less is seen."""
    mixes: bool = True
    """Whether `combine` may use it."""


_SEVEREST = 2


def _options(needed: Estimate) -> Iterator[_Option]:
    """What there is to change about a run, from the mildest on."""
    recipe = needed.recipe
    if recipe.allocator == "default":
        yield _Option("expandable segments", {"allocator": "expandable_segments"})
    if recipe.attention == "eager":
        yield _Option("sdpa attention", {"attention": "sdpa"})
    if not recipe.gradient_checkpointing:
        yield _Option("checkpointing", {"gradient_checkpointing": True})
    if recipe.batch_size > 1:
        yield _smaller_batch(recipe)
    yield from _optimizers(recipe)
    if recipe.dtype == "fp32":
        # Frozen weights were mostly published in 16 bits: nothing is lost.
        yield _Option("bf16 weights", {"dtype": "bf16"}, severity=1 if recipe.lora is None else 0)
    yield from _adapters(recipe, _fresh_adapters(needed))
    if recipe.seq_len // 2 >= SHORTEST:
        yield _Option("half the sequence", {"seq_len": recipe.seq_len // 2}, severity=2)


def _smaller_batch(recipe: Recipe) -> _Option:
    """The same samples to an optimizer step, in more micro-batches."""
    batch = recipe.batch_size
    parts = next((n for n in range(2, int(batch**0.5) + 1) if batch % n == 0), batch)
    values = {
        "batch_size": batch // parts,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps * parts,
    }
    return _Option("half the batch" if parts == 2 else f"1/{parts} of the batch", values)


_LIGHTER = {
    # algorithm: 8-bit states, and these in managed memory
    "adamw": ("adamw_8bit", "paged_adamw_8bit"),
    "ademamix": ("ademamix_8bit", "paged_ademamix_8bit"),
    "lion": ("lion_8bit", "paged_lion_8bit"),
    "rmsprop": ("rmsprop_bnb_8bit", None),
}


def _rounds(recipe: Recipe) -> bool:
    """Whether the optimizer's states are quantized."""
    return OPTIMIZERS[recipe.optimizer].bits in (4, 8)


def _optimizers(recipe: Recipe) -> Iterator[_Option]:
    """Lighter ones of the same algorithm."""
    now = OPTIMIZERS[recipe.optimizer]
    eight_bit, paged = _LIGHTER.get(now.algorithm, (None, None))
    if eight_bit is not None and not _rounds(recipe):
        yield _Option("8-bit states", {"optimizer": eight_bit}, severity=1)
    if paged is not None and not (now.paged and now.bits == 8):
        yield _Option("paged 8-bit states", {"optimizer": paged}, severity=1)


def _fresh_adapters(needed: Estimate) -> LoRA:
    """The default ones; where experts are adapted too, without dropout: peft refuses that."""
    merged = any(t.former for t in inventory(needed.architecture))
    return LoRA(dropout=0.0) if merged else LoRA()


def _adapters(recipe: Recipe, fresh: LoRA) -> Iterator[_Option]:
    lora = recipe.lora
    if lora is None:
        yield _Option("LoRA", {"lora": fresh}, severity=1)
        # A mix gets there from LoRA, if LoRA is not enough.
        both = {"lora": fresh, "quantization": "nf4"}
        yield _Option("QLoRA (nf4)", both, severity=1, mixes=False)
        return
    if recipe.quantization in (None, "int8"):
        yield _Option("nf4 weights", {"quantization": "nf4"}, severity=1)
    if lora.dropout:
        dry = replace(lora, dropout=0.0)
        yield _Option("no LoRA dropout", {"lora": dry}, severity=1, mixes=False)


# --- their effect ---------------------------------------------------------------------------


def _tried(needed: Estimate, values: dict[str, Any]) -> Estimate | None:
    """`needed` with other values in its recipe; None where the libraries refuse that."""
    try:
        return estimate(needed.architecture, replace(needed.recipe, **values), needed.gpu)
    except UserError:
        return None


def _change(needed: Estimate, then: Estimate, name: str, alters: bool) -> Change:
    return Change(
        name=name,
        recipe=then.recipe,
        required=then.required,
        saving=needed.required - then.required,
        fits=then.fits,
        managed=then.managed,
        flags=recipe_flags(then.recipe, needed.recipe),
        alters_training=alters,
    )


def _greedy(needed: Estimate, severity: int) -> Estimate | None:
    current = needed
    while not current.fits:
        options = (o for o in _options(current) if o.mixes and o.severity <= severity)
        tried = (_tried(current, option.values) for option in options)
        found = [then for then in tried if then is not None and then.required < current.required]
        if not found:
            return None
        mildest = next((then for then in found if then.fits), None)
        current = mildest or min(found, key=lambda then: then.required)
    return current


# Fields that go back together, the one that costs the user most first.
_REVERTIBLE = (
    ("seq_len",),
    ("quantization", "lora"),
    ("quantization",),
    ("lora",),
    ("dtype",),
    ("batch_size", "gradient_accumulation_steps"),
    ("optimizer",),
    ("gradient_checkpointing",),
    ("attention",),
    ("allocator",),
)


def _without_needless(needed: Estimate, found: Estimate) -> Estimate:
    """`found`, less what it took on the way and does not need in the end."""
    for names in _REVERTIBLE:
        values = {name: getattr(needed.recipe, name) for name in names}
        if all(value == getattr(found.recipe, name) for name, value in values.items()):
            continue
        then = _tried(found, values)
        if then is not None and then.fits:
            found = then
    return found


def _named(recipe: Recipe, base: Recipe) -> tuple[str, bool]:
    """What of `base` is changed in `recipe`, in words, and whether that alters training."""
    words = {
        "allocator": "expandable segments",
        "attention": f"{recipe.attention} attention",
        "gradient_checkpointing": "checkpointing",
        "batch_size": f"micro-batches of {recipe.batch_size}",
        "optimizer": recipe.optimizer,
        "dtype": f"{recipe.dtype} weights",
        "quantization": f"{recipe.quantization} weights",
        "lora": "LoRA",
        "seq_len": f"{recipe.seq_len} tokens",
    }
    changed = [name for name in words if getattr(recipe, name) != getattr(base, name)]
    alters = not {"quantization", "lora", "seq_len"}.isdisjoint(changed)
    alters |= "dtype" in changed and recipe.lora is None
    alters |= _rounds(recipe) and not _rounds(base)
    return ", ".join(words[name] for name in changed), alters
