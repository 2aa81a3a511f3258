"""`vramplan accuracy`: how predictions held in this machine's runs."""

from __future__ import annotations

import click


@click.command("accuracy")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """Sum up the runs that were launched here: how far predictions were off, by card and method.

    Runs join a local archive (~/.local/share/vramplan, or under $XDG_DATA_HOME) and go nowhere
    else. What they had outside the allocator is used in estimates for the same card; nothing else
    of an estimate is fitted to them.
    """
    from vramplan_launcher import archive

    from vramplan.reports.archive import render, summarise

    summary = summarise(archive.runs())
    if as_json:
        import json

        click.echo(json.dumps(summary.to_dict(), indent=2))
        return
    click.echo(render(summary, str(archive.folder())))
