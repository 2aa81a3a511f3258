"""`export`: a recipe as another tool's file."""

from __future__ import annotations

from collections.abc import Callable

from vramplan.errors import UnknownName
from vramplan.recipe.exchange import write_accelerate, write_python, write_yaml
from vramplan.recipe.exchange.result import Exported, Options
from vramplan.recipe.recipe import Recipe

Writer = Callable[[str, Recipe, Options, str], Exported]

TARGETS: dict[str, Writer] = {
    "training-arguments": write_python.training_arguments,
    "trl": write_python.trl,
    "accelerate": write_accelerate.accelerate,
    "axolotl": write_yaml.axolotl,
    "llama-factory": write_yaml.llama_factory,
}
"""What is written for, and by whom."""


def export(
    target: str,
    model: str,
    recipe: Recipe,
    options: Options | None = None,
    *,
    ds_config: str = "ds_config.json",
) -> Exported:
    """The run as `target`'s file; `ds_config` is where a recipe with deepspeed has its config.

    Raises UnknownName for a target that is none.
    """
    if target not in TARGETS:
        raise UnknownName("target (--to)", target, TARGETS)
    return TARGETS[target](model, recipe, options or Options(), ds_config)
