"""The trace: a run's real code on fake tensors, every storage counted as it is born and freed.

`trace_model(model, recipe)` finds a model's config and returns what `vramplan.estimate` returns,
from a trace; `trace(config, recipe)` is the plain one underneath: it builds the transformers model,
peft's adapters and the optimizer as the launcher would, without a GPU and without memory for
weights, and runs training steps as transformers' `Trainer` does. Both need torch, transformers,
peft and accelerate, on any machine; names are loaded when they are first used, so importing this
needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vramplan_launcher.trace.api import Traced, trace_model
    from vramplan_launcher.trace.compare import compared
    from vramplan_launcher.trace.counting import Counter, Phase, Storage
    from vramplan_launcher.trace.scaling import trace_deep
    from vramplan_launcher.trace.steps import Trace, trace

_HOMES = {
    "Counter": "counting",
    "Phase": "counting",
    "Storage": "counting",
    "Trace": "steps",
    "Traced": "api",
    "compared": "compare",
    "trace": "steps",
    "trace_deep": "scaling",
    "trace_model": "api",
}

__all__ = [
    "Counter",
    "Phase",
    "Storage",
    "Trace",
    "Traced",
    "compared",
    "trace",
    "trace_deep",
    "trace_model",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'vramplan_launcher.trace' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"vramplan_launcher.trace.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
