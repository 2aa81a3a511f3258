"""A goal on the command line: its own options, and the recipe's, which are decisions here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from vramplan.cli.asked import Asked
    from vramplan.planner.goal import Goal
    from vramplan.recipe.recipe import Recipe

GOAL_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--method", metavar="NAMES", help="Of full,lora,int8,qlora: those to consider. [all]"
    ),
    click.option(
        "--effective-batch", metavar="N", help="Sequences to an optimizer step, all cards. [16]"
    ),
    click.option("--tokens", metavar="N", help="To train on: 10M, 2B, ... [10M]"),
    click.option("--price", metavar="DOLLARS", help="Of a card and hour. [a list price]"),
    click.option("--objective", metavar="NAME", help="What is to be least: cost or time. [cost]"),
    click.option(
        "--allow-8bit-optim", is_flag=True, help="AdamW with 8-bit states may be chosen too."
    ),
    click.option("--host-memory", metavar="SIZE", help="For offloading: 128GB, ... [this host's]"),
)
_NONE = ("none", "no")
_COUNTS = ("batch_size", "gradient_accumulation_steps", "world_size", "optim_rank")
_BATCH = ("batch_size", "gradient_accumulation_steps", "world_size")
_ADAPTED = ("lora", "int8", "qlora")
_ZERO = ("zero", "offload_optimizer", "offload_param", "nvme_path")
_RUNS = ("axolotl", "llama-factory", "trl", "plan")
"""Kinds of file that say all of what is trained: the method and the effective batch are theirs."""


def goal_of(asked: Asked, given: dict[str, Any]) -> Goal:
    """The goal of the options. Raises UserError."""
    from vramplan.planner.goal import Goal
    from vramplan.units import parse_count, parse_size

    pins = _pins_of(asked)
    lora, seq_len = pins.pop("lora", None), pins.pop("seq_len", None)
    values: dict[str, Any] = {}
    if seq_len is not None:
        values["seq_len"] = seq_len
    chosen = {name: value for name, value in asked.fields.items() if value is not None}
    if "seq_len" in chosen:
        values["seq_len"] = parse_count(chosen.pop("seq_len"), thing="seq_len")
    run = _run_of(asked)
    named = _named_by(run, chosen) if given["method"] is None else given["method"]
    values["methods"], values["lora"] = _methods(named, lora, chosen)
    if given["effective_batch"] is not None:
        values["effective_batch"] = parse_count(given["effective_batch"], thing="effective batch")
    if given["tokens"] is not None:
        values["tokens"] = parse_tokens(given["tokens"])
    if given["price"] is not None:
        values["price"] = _number(given["price"], "price")
    if given["objective"] is not None:
        values["objective"] = given["objective"]
    if given["host_memory"] is not None:
        values["host_memory"] = parse_size(given["host_memory"], thing="host memory")
    of_file = {name: pins.get(name, 1) for name in _BATCH}
    pins |= _pins(chosen)
    if "effective_batch" not in values:
        values |= _batch_of(of_file, pins, whole=run is not None)
    return Goal(**values, pins=pins, allow_8bit_optim=given["allow_8bit_optim"])


def _run_of(asked: Asked) -> Recipe | None:
    """The recipe of a file that says all of what is trained."""
    imported = asked.imported
    return imported.recipe if imported is not None and imported.kind in _RUNS else None


def _named_by(run: Recipe | None, chosen: dict[str, Any]) -> str | None:
    """The method of a file's run, unless an option names another."""
    from vramplan.planner.goal import method_of

    if run is None or {"lora", "quantization"} & set(chosen):
        return None
    if run.lora is None and any(name.startswith("lora_") for name in chosen):
        return None
    return method_of(run)


def _batch_of(of_file: dict[str, int], pins: dict[str, Any], *, whole: bool) -> dict[str, int]:
    """The effective batch that a file means, or that the options leave no choice about. `whole`:
    the file says it even by 1."""
    if not whole and set(of_file.values()) == {1} and not {*_BATCH[:2]} <= set(pins):
        return {}
    product = 1
    for name in _BATCH:
        product *= pins.get(name, 1)
    return {"effective_batch": product}


def _pins_of(asked: Asked) -> dict[str, Any]:
    """What a recipe file, or another tool's, says that is not the default anyway."""
    recipe = None if asked.imported is None else asked.imported.recipe
    if asked.recipe_file is not None:
        from vramplan.recipe.files import read_recipe

        recipe = read_recipe(asked.recipe_file)
    return {} if recipe is None else _decided(recipe)


def _decided(recipe: Recipe) -> dict[str, Any]:
    from vramplan.recipe.recipe import Recipe

    open_ = Recipe()
    found = {name: getattr(recipe, name) for name in Recipe.__slots__}
    return {name: value for name, value in found.items() if value != getattr(open_, name)}


def _methods(named: str | None, lora: Any, chosen: dict[str, Any]) -> tuple[Any, Any]:
    """(methods, LoRA's decided fields), taken out of `chosen`."""
    wanted = chosen.pop("lora", None)
    fields = lora.to_dict() if lora is not None else {}
    given = {n.removeprefix("lora_"): chosen.pop(n) for n in tuple(chosen) if n[:5] == "lora_"}
    if "rank" in given:
        from vramplan.units import parse_count

        given["rank"] = parse_count(given["rank"], thing="lora.rank")
    if "targets" in given:
        given["target_modules"] = _names(given.pop("targets"))
    fields |= given
    methods: tuple[str, ...] | None = None
    if named is None:
        if wanted is not None or lora is not None or given:
            methods = ("full",) if wanted is False else _ADAPTED
    else:
        methods = tuple(n for name in named.split(",") if (n := name.strip().lower())) or (named,)
    if wanted is False and (given or (named is not None and methods != ("full",))):
        from vramplan.planner.goal import contradiction

        other = "options of LoRA" if given else f"--method {named}"
        raise contradiction("--no-lora", other)
    if (wanted or given) and methods == ("full",):
        from vramplan.planner.goal import contradiction

        raise contradiction("--lora" if wanted else "options of LoRA", f"--method {named}")
    return methods, fields or None


def _pins(chosen: dict[str, Any]) -> dict[str, Any]:
    """Options of the recipe as pins."""
    from vramplan.units import parse_count

    pins: dict[str, Any] = {}
    if "deepspeed" in chosen:
        pins |= _pins_of_ds_config(chosen)
    for name, value in chosen.items():
        if name == "deepspeed" or ("deepspeed" in chosen and name in _ZERO):
            continue
        if name in _COUNTS:
            pins[name] = parse_count(value, thing=name)
        elif name == "zero":
            pins[name] = None if value.lower() in _NONE else _stage(value)
        elif name == "optim_target_modules":
            pins[name] = _names(value)
        elif name in ("quantization", "offload_optimizer", "offload_param"):
            pins[name] = None if value.lower() in _NONE else value
        else:
            pins[name] = value
    return pins


def _names(text: str) -> str | tuple[str, ...]:
    names = tuple(n for name in text.split(",") if (n := name.strip()))
    return names[0] if len(names) == 1 else names


def _stage(text: str) -> Any:
    return int(text) if text.isdigit() else text


def _pins_of_ds_config(chosen: dict[str, Any]) -> dict[str, Any]:
    """What a ds_config.json decides, and the options that override it."""
    from vramplan.cli.recipe_options import recipe_of

    return _decided(recipe_of(None, {n: chosen[n] for n in ("deepspeed", *_ZERO) if n in chosen}))


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_tokens(text: str) -> int:
    """A number of tokens: "10M", "1.5B", "300k", "1e9". Decimal, as corpora are counted."""
    from vramplan.errors import InvalidValue

    cleaned = text.strip().lower().replace("_", "").replace(",", "")
    unit = cleaned[-1:] if cleaned[-1:] in _UNITS else ""
    try:
        count = float(cleaned.removesuffix(unit)) * _UNITS[unit]
        if count >= 1 and count == int(count):
            return int(count)
    except (ValueError, OverflowError):
        pass
    raise InvalidValue("tokens", text, "a number of at least 1, such as 500000, 10M or 2B")


def _number(text: str, thing: str) -> float:
    from vramplan.errors import InvalidValue

    try:
        return float(text)
    except ValueError:
        raise InvalidValue(thing, text, "a number, such as 1.99") from None
