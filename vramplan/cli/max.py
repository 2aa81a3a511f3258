"""`vramplan max MODEL`: the longest sequence and the largest batch that fit."""

from __future__ import annotations

import click

from vramplan.cli.asked import Asked, command_about_a_run


@command_about_a_run("max", cards="what is in this machine")
def command(ctx: click.Context, asked: Asked) -> None:
    """Say how long a sequence, and how large a micro-batch, of MODEL fits on a card.

    With --seq-len the largest batch of such sequences, with --batch-size the longest sequence in
    such batches; with both or neither, both. Exact: one more would not fit.

    Exit code: 0 if something fits, 1 if not even one token does, 2 if the input is wrong.
    """
    from vramplan.planner.cards import groups_of
    from vramplan.planner.limits import limits, within_positions

    recipe = asked.recipe()
    groups, _ = groups_of(asked.card)
    # Of unlike cards, the one that has most room.
    gpus = max(groups, key=lambda g: g.gpu.capacity if g.free is None else g.free)
    model = asked.located().config if asked.offline else asked.model
    if asked.fields["seq_len"] is None and asked.recipe_file is None:
        recipe = within_positions(model, recipe)
    found = limits(model, recipe, gpus, _wanted(asked))
    if asked.as_json:
        import json

        document = {
            "schema": 1,
            "model": {"id": asked.model},
            "gpu": gpus.to_dict(),
            "limits": [limit.to_dict() for limit in found],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        from vramplan.cli.terminal import look
        from vramplan.reports.limits import show

        click.echo(show(asked.model, gpus, found, look()))
    ctx.exit(0 if any(limit.largest for limit in found) else 1)


def _wanted(asked: Asked) -> tuple[str, ...]:
    given = [n for n in ("seq_len", "batch_size") if asked.fields.get(n) is not None]
    if given == ["seq_len"]:
        return ("batch_size",)
    return ("seq_len",) if given == ["batch_size"] else ("seq_len", "batch_size")
