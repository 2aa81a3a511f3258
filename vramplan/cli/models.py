"""`vramplan models [QUERY]`: the checkpoints that come with vramplan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vramplan.errors import ModelNotFound
    from vramplan.models.catalogue import Entry


@click.command("models")
@click.argument("query", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(query: tuple[str, ...], as_json: bool) -> None:
    """List the models whose configs are bundled, so that they need no network.

    QUERY keeps those that hold each of its words in their id or family: `llama 8b`, `gemma2`.
    Any other model works too, by its Hub id, its folder, or its config.json.
    """
    from vramplan.models import catalogue

    words = " ".join(query)
    found = catalogue.search(words)
    if not found:
        raise _nothing(words)
    if as_json:
        click.echo(_json(found))
    else:
        _table(found)


def _nothing(query: str) -> ModelNotFound:
    from vramplan.errors import ModelNotFound
    from vramplan.models import catalogue

    close = ", ".join(catalogue.similar(query))
    return ModelNotFound(
        f"no bundled model matches {query!r}{f'; nearest: {close}' if close else ''}. "
        "`vramplan models` lists them all; any other works by its Hub id, folder or config.json"
    )


def _json(found: tuple[Entry, ...]) -> str:
    import json

    models = [
        {"id": entry.id, "model_type": entry.model_type, "parameters": entry.params}
        for entry in found
    ]
    return json.dumps({"schema": 1, "models": models}, indent=2)


def _table(found: tuple[Entry, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vramplan.units import format_count

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("family", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    for entry in found:
        table.add_row(entry.id, entry.model_type, format_count(entry.params))
    Console(highlight=False).print(table)
