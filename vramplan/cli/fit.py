"""`vramplan fit MODEL`: the cheapest configuration that fits, and what lies next to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vramplan.cli.asked import Asked, command_about_a_run
from vramplan.cli.fit_launch import LAUNCH_OPTIONS
from vramplan.cli.goal_options import GOAL_OPTIONS, goal_of

if TYPE_CHECKING:
    from vramplan.planner.explain import Step
    from vramplan.planner.goal import Goal
    from vramplan.planner.plan import Plan


_CHOSEN = (
    *("dtype", "mixed_precision", "quantization", "double_quant", "lora", "attention"),
    *("gradient_checkpointing", "optimizer", "batch_size", "gradient_accumulation_steps", "zero"),
    *("offload_optimizer", "offload_param", "world_size", "allocator"),
)
_OPEN = dict.fromkeys(_CHOSEN, "")


@command_about_a_run(
    "fit",
    *GOAL_OPTIONS,
    click.option("--which-gpu", is_flag=True, help="The cheapest card of the catalogue instead."),
    *LAUNCH_OPTIONS,
    click.option("--all", "everything", is_flag=True, help="Of --json: every candidate too."),
    click.option("--save", "path", metavar="FILE", help="Write the plan as JSON."),
    cards="what is in this machine",
    importing=True,
    defaults=_OPEN,
)
def command(
    ctx: click.Context,
    asked: Asked,
    *,
    which_gpu: bool,
    everything: bool,
    path: str | None,
    **goal: Any,
) -> None:
    """Find the cheapest way to fine-tune MODEL that fits, of all that are legal.

    An option that is given is a decision, and is kept to; what is left open is chosen: method,
    precision, checkpointing, attention, optimizer, micro-batch, ZeRO stage, offloading, number of
    cards.

    Exit code: 0 if a plan was found, 1 if nothing fits, 2 if the input is wrong.
    """
    from vramplan.cli.fit_launch import check_card, launched, take
    from vramplan.errors import UserError

    options = take(goal)
    wanted = goal_of(asked, goal)
    if everything and not asked.as_json:
        raise UserError("--all means nothing without --json")
    if which_gpu:
        _check_alone({"--launch": goal["launch"], "--save": path, "--all": everything})
        ctx.exit(_which(asked, wanted))
    if goal["launch"]:
        check_card(asked.card, cpu=options["cpu"])
    if options["cpu"]:
        ctx.exit(_tiny(asked.model, wanted, options))
    plan = _planned(asked, wanted, options["emulate_gpu"])
    if path is not None and plan.pick is not None:
        plan.save(path)
    command = "" if goal["launch"] else _to_run(plan, asked.model)
    click.echo(_json(plan, everything) if asked.as_json else _text(plan, command))
    if plan.pick is not None and goal["launch"]:
        ctx.exit(launched(plan, asked.model, asked.card, options))
    ctx.exit(1 if plan.pick is None else 0)


def _tiny(model: str, goal: Goal, options: dict[str, Any]) -> int:
    """The whole loop on the processor."""
    from vramplan.cli.fit_launch import TINY, TINY_CARD, launched, tiny_plan

    plan = tiny_plan(goal)
    click.echo(f"{plan.id} stands in for {model}. It is planned for a {TINY_CARD} card,")
    click.echo(f"and runs on the processor.\n\n{_text(plan)}\n")
    return launched(plan, str(TINY), TINY_CARD, {**options, "random_weights": True})


def _planned(asked: Asked, goal: Goal, emulated: str | None = None) -> Plan:
    from vramplan.planner.plan import fit

    card = emulated or asked.card
    if not asked.offline:
        return fit(asked.model, card, goal)
    from dataclasses import replace

    located = asked.located()
    plan = fit(located.config, card, goal)
    notes = (located.note,) if located.note else ()
    return replace(plan, id=located.id, source=asked.model, notes=(*notes, *plan.notes))


def _json(plan: Plan, everything: bool) -> str:
    import json

    document = plan.to_dict()
    document["with_more"] = [step.to_dict() for step in _steps(plan)]
    if everything:
        document["candidates"] = plan.table()
    return json.dumps(document, indent=2)


def _to_run(plan: Plan, model: str) -> str:
    """What runs the pick: on the cards here, those of them that it uses. Empty where options can't
    say all of it."""
    if plan.gpus.indices:
        return "this command, with --launch --data train.jsonl"
    from vramplan.cli.terminal import command_line, look
    from vramplan.memory.advice import recipe_flags

    if plan.recipe is None or "deepspeed" in plan.goal.pins:
        return ""
    words = ("vramplan", "launch", model, *recipe_flags(plan.recipe), "--data", "train.jsonl")
    return command_line(words, look().width - 2)


def _text(plan: Plan, command: str = "") -> str:
    from vramplan.cli.terminal import look

    if plan.pick is None:
        from vramplan.reports.misses import show as show_misses

        return show_misses(plan, look=look())
    from vramplan.reports.plan import show

    return show(plan, steps=_steps(plan), command=command, look=look())


def _steps(plan: Plan) -> list[Step]:
    """The same job on the next larger card, and on one more."""
    from vramplan.planner.explain import larger_card, more_cards

    return [step for step in (larger_card(plan), more_cards(plan)) if step is not None]


def _check_alone(options: dict[str, Any]) -> None:
    """Raises UserError for an option that has no sense beside --which-gpu."""
    from vramplan.planner.goal import contradiction

    for name, value in options.items():
        if value:
            raise contradiction("--which-gpu", name, "it compares cards, and makes no plan")


def _which(asked: Asked, goal: Goal) -> int:
    from vramplan.cli.terminal import look
    from vramplan.cli.trace import working
    from vramplan.planner.which import which_gpu

    model = asked.located().config if asked.offline else asked.model
    with working("Planning on every card ..."):
        offers = which_gpu(model, goal, asked.card)
    if asked.as_json:
        import json

        click.echo(json.dumps([offer.to_dict() for offer in offers], indent=2))
    else:
        from vramplan.reports.which import show

        click.echo(show(asked.model, goal, offers, look=look()))
    return 0 if offers else 1
