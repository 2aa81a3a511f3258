"""`read_any`: a file of another tool's, told by the keys that it has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vramplan.errors import InvalidValue, UserError
from vramplan.recipe.exchange import axolotl, llama_factory, training_arguments
from vramplan.recipe.exchange.result import Imported
from vramplan.recipe.exchange.trainer_keys import HARMLESS, TRL_OWN
from vramplan.recipe.recipe import Recipe

_DEEPSPEED = {
    *("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
    *("zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
}
_RECIPE = {field.name for field in fields(Recipe)}
_FORMATS = (
    "an Axolotl YAML (base_model), a LLaMA-Factory YAML (model_name_or_path and finetuning_type), "
    "TRL's YAML, TrainingArguments as JSON, a ds_config.json, a recipe, or a plan.json"
)


def read_any(path: str | os.PathLike[str]) -> Imported:
    """The run that a file of another tool's describes; which tool's, its keys tell.

    Raises UserError: a file that can't be read, is malformed, or is of none of them; and whatever
    of it can't be estimated.
    """
    file = Path(path).expanduser()
    values = _values(file)
    name, folder = file.name, str(file.parent)
    if not isinstance(values, Mapping) or not values:
        raise UserError(f"{str(file)!r} holds no table of keys: {_FORMATS} can be read")
    return _reader_of(values, file)(values, name, folder)


def _reader_of(
    values: Mapping[str, Any], file: Path
) -> Callable[[Mapping[str, Any], str, str], Imported]:
    keys = {str(key) for key in values}
    if "schema" in keys and "recipe" in keys:
        return _plan
    if "base_model" in keys:
        return axolotl.read
    if keys & _DEEPSPEED and "output_dir" not in keys:
        return _ds_config
    if "model_name_or_path" in keys and keys & llama_factory.OWN:
        return llama_factory.read
    if keys <= _RECIPE:
        return _recipe
    known = {"per_device_train_batch_size", "optim", "output_dir", "model_name_or_path", *TRL_OWN}
    if keys & known and len(keys & (HARMLESS | known)) * 2 >= len(keys):
        return training_arguments.read
    raise UserError(f"{str(file)!r} is no file that is known: {_FORMATS} can be read")


def _values(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {str(file)!r}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{str(file)!r} is malformed: {error}") from error
    suffix = file.suffix.lower()
    if suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{str(file)!r} is malformed: {error}") from error
    if suffix in (".yaml", ".yml"):
        return _yaml(text, file)
    raise InvalidValue("file", str(file), "a .yaml, .yml or .json file")


def _yaml(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:  # huggingface_hub brings it
        raise UserError(f"reading {str(file)!r} needs PyYAML: pip install pyyaml") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{str(file)!r} is malformed{where}: {problem}") from error


def _recipe(values: Mapping[str, Any], name: str, folder: str) -> Imported:
    return Imported(kind="recipe", model=None, recipe=Recipe.from_dict(values))


def _plan(values: Mapping[str, Any], name: str, folder: str) -> Imported:
    """A plan.json, or an estimate's own JSON."""
    model = values.get("model")
    if isinstance(model, Mapping):
        model = model.get("source") or model.get("id")
    if not isinstance(values["recipe"], Mapping):
        raise UserError(f"{name} has no recipe: it is a plan of what does not fit")
    recipe = Recipe.from_dict(values["recipe"])
    return Imported(kind="plan", model=model if isinstance(model, str) else None, recipe=recipe)


def _ds_config(values: Mapping[str, Any], name: str, folder: str) -> Imported:
    from vramplan.recipe.ds_merge import merged

    found, warnings = merged(Path(folder) / name, {}, {})
    recipe = training_arguments.made(found, name)
    said = f"{name}: a ds_config.json says nothing of the model, the sequence length, dtype, LoRA …"
    return Imported(
        kind="deepspeed", model=None, recipe=recipe, warnings=(*warnings, f"{said}: give options")
    )
