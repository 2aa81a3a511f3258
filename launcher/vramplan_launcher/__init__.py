"""The launcher of vramplan: everything that needs torch (`pip install vramplan[launch]`).

    from vramplan_launcher import MemoryCheck

    trainer = Trainer(..., callbacks=[MemoryCheck()])

It imports vramplan; vramplan reaches it only inside a command's callback. Names are loaded when
they are first used: importing this costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vramplan_launcher.callback import MemoryCheck, MemoryWarning
    from vramplan_launcher.data import DataSpec
    from vramplan_launcher.job import Job, Training
    from vramplan_launcher.run import Launch, Outcome, launch, new_folder

_HOMES = {
    "DataSpec": "data",
    "Job": "job",
    "Launch": "run",
    "MemoryCheck": "callback",
    "MemoryWarning": "callback",
    "Outcome": "run",
    "Training": "job",
    "launch": "run",
    "new_folder": "run",
}

__all__ = [
    "DataSpec",
    "Job",
    "Launch",
    "MemoryCheck",
    "MemoryWarning",
    "Outcome",
    "Training",
    "launch",
    "new_folder",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'vramplan_launcher' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"vramplan_launcher.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
