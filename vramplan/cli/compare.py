"""`vramplan compare RUN…`: past runs, predicted against measured."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("runs", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(runs: tuple[str, ...], as_json: bool) -> None:
    """Show what was predicted of each RUN (a run's folder, or its measurement.json), and measured.

    Of a run that Slurm started, the ranks' figures are put together first.
    """
    from vramplan_launcher.measurement import measurement_of

    from vramplan.reports.run import compare, render

    found = [compare(measurement_of(Path(run))) for run in runs]
    if as_json:
        import json

        click.echo(json.dumps([each.to_dict() for each in found], indent=2))
        return
    click.echo("\n\n".join(render(each) for each in found))
