"""The command `vramplan`: a group that loads a command's module when that command runs.

Exit codes: 0 done and, where a GPU was given, it fits; 1 it does not fit or nothing fits;
2 the input is wrong; 70 a bug of vramplan's, with its traceback; 130 interrupted; 141 the reader of
our output went away.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vramplan import __version__
from vramplan.errors import UnknownName, VramplanError

BUG = 70
"""sysexits.h's EX_SOFTWARE. Not Python's own 1: that says that a run does not fit."""
INTERRUPTED = 130
"""128 + SIGINT, as shells count it."""
BROKEN_PIPE = 141
"""128 + SIGPIPE. Not 1: that says that a run does not fit."""
SELDOM = 50_000
"""New objects between two collections of garbage cycles."""

# Name: the line that `vramplan --help` shows. The command is `command` in vramplan.cli.<name>.
COMMANDS = {
    "estimate": "How much GPU memory a fine-tuning run needs.",
    "trace": "The same from the model's real code, run on fake tensors.",
    "launch": "Run it for real, then show how the prediction held.",
    "verify": "A short real run, only to compare with the prediction.",
    "compare": "Past runs: predicted against measured.",
    "accuracy": "How predictions held in the runs that were launched here.",
    "config": "Write DeepSpeed's and accelerate's configs, with reasons.",
    "export": "Write the run for Trainer, TRL, Axolotl and others.",
    "fit": "The cheapest configuration that fits, of all that are legal.",
    "ladder": "Each saving in turn, and the checklist by impact.",
    "sweep": "One table over values of a recipe's fields.",
    "max": "The longest sequence and the largest batch that fit.",
    "models": "List the models whose configuration comes with vramplan.",
    "gpus": "List the known GPUs, or those in this machine.",
}


class Failure(click.ClickException):
    """A VramplanError as click shows one: "Error: …" on stderr, its exit code, no traceback."""

    def __init__(self, error: VramplanError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click reads it from the instance


class LazyGroup(click.Group):
    """Commands by name in COMMANDS; help is written from there, so that it imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            ctx.fail(str(UnknownName("command", cmd_name, COMMANDS)))
        from importlib import import_module

        command = import_module(f"vramplan.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)  # --help is written in here
        except BrokenPipeError:
            raise click.exceptions.Exit(BROKEN_PIPE) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VramplanError as error:
            raise Failure(error) from error
        except BrokenPipeError:  # before click sees it, and ends with 1
            raise click.exceptions.Exit(BROKEN_PIPE) from None


@click.group(
    cls=LazyGroup, name="vramplan", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="vramplan", message="%(prog)s %(version)s")
def cli() -> None:
    """Say, before a GPU is touched, how much memory a fine-tuning run needs."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit code."""
    _never_fail_to_encode()
    try:
        code = _run(args)
    except Exception:
        import traceback

        traceback.print_exc()
        code = BUG
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = BROKEN_PIPE
    if code == BROKEN_PIPE:
        # What is still buffered would raise again when Python closes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def run() -> NoReturn:
    """The program `vramplan`: `main`, and then the process's end.

    A command makes few garbage cycles. Looking for them after every 700 new objects, and through
    all modules on the way out, takes a fifth of the time that a bare `import click, rich` does.
    """
    gc.set_threshold(SELDOM)
    code = main()
    gc.freeze()
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args, prog_name="vramplan", standalone_mode=False)
    except click.Abort:
        # click turns KeyboardInterrupt into this, after it ended the line with "^C" in it.
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    # A command ends with another code by ctx.exit(code), which click returns here.
    return result if isinstance(result, int) else 0


def _never_fail_to_encode() -> None:
    """An output that can't show a character (cp1252, ASCII) gets a "?", never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
