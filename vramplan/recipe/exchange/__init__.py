"""Recipes as other tools' files: what those say of a run, and a run as they would say it.

One file a format. Reading never guesses silently: what changes memory and is not modelled is
warned of by its key; what costs none is kept in `Imported.quiet`.
"""

from __future__ import annotations

from vramplan.recipe.exchange.files import read_any
from vramplan.recipe.exchange.result import Exported, Imported, Options
from vramplan.recipe.exchange.write import TARGETS, export

__all__ = ["TARGETS", "Exported", "Imported", "Options", "export", "read_any"]
