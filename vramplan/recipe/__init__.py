"""What a user chooses about a run: the recipe, its rules, its optimizers, and its files."""

from __future__ import annotations

from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

__all__ = ["DeepSpeed", "LoRA", "Recipe"]
