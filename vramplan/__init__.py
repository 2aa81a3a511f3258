"""vramplan says, before a GPU is touched, how much memory a fine-tuning run of a model needs.

    from vramplan import LoRA, Recipe, estimate

    needed = estimate("meta-llama/Llama-3.1-8B", Recipe(lora=LoRA(rank=16)), gpu="24GB")
    print(needed.peak_allocated, needed.required, needed.fits)

Names are loaded when they are first used: `import vramplan` alone costs next to nothing.
"""

from __future__ import annotations

# typing's, without the import of typing: type checkers know it by its name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from vramplan.errors import (
        ConfigError,
        GatedModel,
        IllegalRecipe,
        InvalidValue,
        ModelNotFound,
        Offline,
        TimedOut,
        UnknownName,
        UserError,
        VramplanError,
    )
    from vramplan.memory.estimate import Estimate, estimate
    from vramplan.models.architecture import Architecture
    from vramplan.planner.goal import Goal
    from vramplan.planner.plan import Plan, fit
    from vramplan.recipe.deepspeed import DeepSpeed
    from vramplan.recipe.recipe import LoRA, Recipe

__version__ = "0.1.0"

# Where each public name lives. `__all__` is what is public; a test holds the two together.
_HOMES = {
    "Architecture": "vramplan.models.architecture",
    "ConfigError": "vramplan.errors",
    "DeepSpeed": "vramplan.recipe.deepspeed",
    "Estimate": "vramplan.memory.estimate",
    "GatedModel": "vramplan.errors",
    "Goal": "vramplan.planner.goal",
    "IllegalRecipe": "vramplan.errors",
    "InvalidValue": "vramplan.errors",
    "LoRA": "vramplan.recipe.recipe",
    "ModelNotFound": "vramplan.errors",
    "Offline": "vramplan.errors",
    "Plan": "vramplan.planner.plan",
    "Recipe": "vramplan.recipe.recipe",
    "TimedOut": "vramplan.errors",
    "UnknownName": "vramplan.errors",
    "UserError": "vramplan.errors",
    "VramplanError": "vramplan.errors",
    "estimate": "vramplan.memory.estimate",
    "fit": "vramplan.planner.plan",
}

__all__ = [
    "Architecture",
    "ConfigError",
    "DeepSpeed",
    "Estimate",
    "GatedModel",
    "Goal",
    "IllegalRecipe",
    "InvalidValue",
    "LoRA",
    "ModelNotFound",
    "Offline",
    "Plan",
    "Recipe",
    "TimedOut",
    "UnknownName",
    "UserError",
    "VramplanError",
    "__version__",
    "estimate",
    "fit",
]


# Hidden from type checkers, which would take it for leave to use any name at all.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(home), name)
        globals()[name] = value  # the next use does not come here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
