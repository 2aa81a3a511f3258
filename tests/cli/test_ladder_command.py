"""`vramplan ladder`."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from vramplan.cli.main import cli

MODEL = "meta-llama/Llama-3.2-1B"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["ladder", *arguments], catch_exceptions=False)


def test_the_report() -> None:
    result = run(MODEL, "--gpu", "rtx-4090")
    assert result.exit_code == 0
    for said in ("as it begins", "sdpa attention", "checkpointing", "LoRA *", "The checklist"):
        assert said in result.output
    assert "* changes what is learned" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_it_begins_with_what_is_given() -> None:
    document = json.loads(run(MODEL, "--gpu", "24GB", "--dtype", "bf16", "--lora", "--json").output)
    first = document["rungs"][0]["recipe"]
    assert first["dtype"] == "bf16"
    assert first["lora"] is not None
    assert first["attention"] == "eager"


def test_no_rung_fits() -> None:
    result = run("meta-llama/Llama-3.1-405B", "--gpu", "8GB")
    assert result.exit_code == 1


def test_the_help_says_where_it_begins() -> None:
    output = run("--help").output
    assert "[fp32]" in output
    assert "[bf16]" not in output.partition("--mixed-precision")[0]
