"""The options of a launched run: its data, its training, and how it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vramplan_launcher.job import Training

    from vramplan.cli.launching import Way

_N: dict[str, Any] = {"metavar": "N", "type": int}

DATA = (
    click.option(
        "--data", metavar="FILE|ID", help="JSONL, JSON, CSV or Parquet, or a datasets id. [random]"
    ),
    click.option("--data-format", metavar="NAME", help="json, csv or parquet. [by its ending]"),
    click.option("--data-subset", metavar="NAME", help="A datasets id's configuration."),
    click.option("--data-split", metavar="NAME", help="A datasets id's split. [train]"),
    click.option("--data-limit", **_N, help="At most so many rows."),
    click.option("--text-column", metavar="NAME", help="Plain text. [text]"),
    click.option("--prompt-column", metavar="NAME", help="[prompt]"),
    click.option("--completion-column", metavar="NAME", help="What is learned. [completion]"),
    click.option("--messages-column", metavar="NAME", help="Conversations. [messages]"),
    click.option("--chat-template", metavar="FILE", help="Jinja. [the tokenizer's]"),
    click.option("--packing/--no-packing", default=None, help="Fill sequences with rows. [yes]"),
    click.option("--padding-mask", is_flag=True, help="Of --no-packing: mask the padding."),
    click.option("--eval-split", metavar="SHARE|NAME", help="0.05, a split, or a file. [none]"),
)
TRAINING = (
    click.option("--epochs", type=float, help="Times through the data. [1]"),
    click.option("--max-steps", **_N, help="Optimizer steps; wins over --epochs."),
    click.option("--learning-rate", type=float, help="[2e-4 with LoRA, else 2e-5]"),
    click.option("--lr-scheduler", metavar="NAME", help="lr_scheduler_type. [cosine]"),
    click.option("--warmup", type=float, help="Steps, or below 1 a share of them. [0.03]"),
    click.option("--weight-decay", type=float, help="[0]"),
    click.option("--max-grad-norm", type=float, help="[1]"),
    click.option("--seed", **_N, help="[42]"),
    click.option("--logging-steps", **_N, help="Between two readings of the loss. [10]"),
    click.option("--eval-steps", **_N, help="Between two evaluations. [each epoch]"),
    click.option("--save-steps", **_N, help="Between two checkpoints; 0: none. [each epoch]"),
    click.option("--save-total-limit", **_N, help="Checkpoints that are kept. [2]"),
    click.option("--report-to", metavar="NAME", help="tensorboard, wandb or none. [none]"),
)
HOW = (
    click.option("--output", metavar="FOLDER", help="The run's, which must be new. [runs/...]"),
    click.option("--emulate-gpu", metavar="SIZE", help="Act as a smaller card: 24GB."),
    click.option("--pretend-ranks", **_N, help="Rank 0 of N on one GPU; trains nothing."),
    click.option("--cpu", is_flag=True, help="On the processor, without memory figures."),
    click.option("--anyway", is_flag=True, help="Start what won't fit."),
    click.option("--fallback", **_N, help="Out of memory: try N smaller plans. [0]"),
    click.option("--allow-8bit-optim", is_flag=True, help="Of --fallback."),
    click.option("--no-archive", is_flag=True, help="Keep it out of `vramplan accuracy`."),
    click.option("--verbose", is_flag=True, help="Show all that the libraries print."),
)
MACHINES = (
    click.option("--launcher", metavar="NAME", help="python, torchrun or deepspeed. [auto]"),
    click.option("--nnodes", **_N, help="Machines. [1]"),
    click.option("--node-rank", **_N, help="This machine's number, from 0."),
    click.option("--rendezvous", metavar="HOST:PORT", help="Where the machines meet."),
    click.option("--hostfile", metavar="FILE", help="DeepSpeed's: lines of `host slots=8`."),
    click.option("--slurm", is_flag=True, help="Write an sbatch script; start nothing."),
    click.option("--slurm-option", multiple=True, metavar="KEY=VALUE", help="partition=gpu, ..."),
)
_COLUMNS = ("text_column", "prompt_column", "completion_column", "messages_column")


def names_of(options: tuple[Any, ...]) -> tuple[str, ...]:
    """The keyword arguments that `options` make."""
    from vramplan.cli.asked import _names_of

    return tuple(_names_of(options))


def data_of(given: dict[str, Any]) -> dict[str, Any] | None:
    """DataSpec's fields; None for random tokens. Raises UserError for options without --data."""
    from vramplan_launcher.data import DataSpec

    from vramplan.errors import UserError

    names = names_of(DATA)
    mine = {n: given.pop(n) for n in names}
    if mine["data"] is None:
        idle = [n for n in names if mine[n] not in (None, False)]
        if idle:
            raise UserError(f"--{idle[0].replace('_', '-')} without --data")
        return None
    fields = {n: mine[n] for n in _COLUMNS}
    fields |= {
        "source": mine["data"],
        "format": mine["data_format"],
        "subset": mine["data_subset"],
        "split": mine["data_split"],
        "limit": mine["data_limit"],
        "template": mine["chat_template"],
        "packing": mine["packing"],
        "padding_mask": mine["padding_mask"] or None,
        "eval_split": _share(mine["eval_split"]),
    }
    known = {name: value for name, value in fields.items() if value is not None}
    return DataSpec.from_dict(known).to_dict()


def _share(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def training_of(given: dict[str, Any], base: Training | None = None) -> Training:
    """Training with what was given; the rest is `base`'s."""
    from dataclasses import replace

    from vramplan_launcher.job import Training

    mine = {n: given.pop(n) for n in names_of(TRAINING)}
    known = {name: value for name, value in mine.items() if value is not None}
    return replace(base or Training(), **known)


def way_of(given: dict[str, Any], *, as_json: bool = False, again: tuple[str, ...] = ()) -> Way:
    """How the run is started. Raises UserError for options that contradict each other."""
    from vramplan.cli.launching import Way
    from vramplan.errors import UserError

    slurm, slurm_options = given.pop("slurm", False), given.pop("slurm_option", None) or ()
    nodes = _nodes(given)
    if slurm_options and not slurm:
        raise UserError(f"--slurm-option {slurm_options[0]} without --slurm")
    idle = next((name for name in nodes if name != "count"), None) if slurm else None
    if idle is not None:
        option = {"rank": "node-rank"}.get(idle, idle)
        raise UserError(f"--slurm with --{option}: Slurm's machines find each other. Leave it out")
    output = given.pop("output")
    return Way(
        output=None if output is None else Path(output),
        anyway=given.pop("anyway"),
        fallback=given.pop("fallback") or 0,
        allow_8bit=given.pop("allow_8bit_optim"),
        launcher=given.pop("launcher", None) or "auto",
        nodes=nodes,
        slurm=slurm,
        slurm_options=tuple(slurm_options),
        verbose=given.pop("verbose"),
        archive=not given.pop("no_archive"),
        as_json=as_json,
        again=again,
    )


def _nodes(given: dict[str, Any]) -> dict[str, Any]:
    """`Nodes`' fields that were given."""
    nodes = {
        "count": given.pop("nnodes", None),
        "rank": given.pop("node_rank", None),
        "rendezvous": given.pop("rendezvous", None),
        "hostfile": given.pop("hostfile", None),
    }
    known = {name: value for name, value in nodes.items() if value is not None}
    if "hostfile" in known:
        known["hostfile"] = Path(known["hostfile"])
    return known
