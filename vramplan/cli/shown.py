"""An estimate on stdout: as text that fits the terminal, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vramplan.memory.advice import Change
    from vramplan.memory.estimate import Estimate


def shown_json(
    needed: Estimate,
    *,
    changes: Sequence[Change] | None = None,
    combination: Change | None = None,
    explaining: bool = False,
) -> str:
    """The estimate's own document; what was asked for besides has keys of its own."""
    import json

    document = needed.to_dict()
    if changes is not None:
        document["advice"] = [change.to_dict() for change in changes]
        document["combination"] = None if combination is None else combination.to_dict()
    if explaining:
        from vramplan.memory.explain import explain

        document["explanation"] = explain(needed).to_dict()
    return json.dumps(document, indent=2)


def shown_text(
    needed: Estimate,
    no_gpu: str,
    *,
    changes: Sequence[Change] | None = None,
    combination: Change | None = None,
    again: Sequence[str] = (),
    explaining: bool = False,
) -> str:
    """The report. `no_gpu`: why there is no verdict; `again`: the command line without a recipe."""
    from vramplan.cli.terminal import command_line, look
    from vramplan.reports.text import show

    here = look()
    command = ""
    if combination is not None:
        from vramplan.memory.advice import recipe_flags

        command = command_line((*again, *recipe_flags(combination.recipe)), here.width - 2)
    text = show(
        needed,
        no_gpu=no_gpu,
        changes=changes,
        combination=combination,
        command=command,
        look=here,
    )
    if not explaining:
        return text
    from vramplan.memory.explain import explain
    from vramplan.reports.explain import render

    return f"{text}\n\n{render(explain(needed))}".rstrip("\n")


def shown_ways(needed: Estimate, *, as_json: bool) -> str:
    """What DDP and each ZeRO stage would need of the same run, side by side."""
    import json

    from vramplan.reports.zero_ways import show_ways, ways_of, ways_to_dict

    ways = ways_of(needed)
    if as_json:
        return json.dumps(ways_to_dict(needed, ways), indent=2)
    from vramplan.cli.terminal import look

    return show_ways(needed, ways, look())
